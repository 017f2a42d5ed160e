import pytest
from planning_cases import LORA, encoder, fit, peak, setting, step

from edge_sdk.errors import MechanismError
from edge_sdk.planning.cost import link_s, round_time, update_bytes, version_bytes


def test_memory_and_time_are_the_formulas_of_the_fit() -> None:
    model = fit()
    assert peak(model, 4, 0) == pytest.approx(170)
    assert peak(model, 4, 4) == pytest.approx(10 + 160 - 100 + 6)
    assert peak(model, 4, 3) == pytest.approx(10 + 160 - 75)  # the top layer is plain
    assert peak(model, 4, 4) < peak(model, 4, 3) < peak(model, 4, 0)
    assert step(model, 4, 3) == pytest.approx(0.1 + 0.2 + 0.03)


def test_a_round_is_download_steps_and_upload() -> None:
    time = round_time(
        fit(), encoder(), LORA, setting(2), steps=10,
        bytes_up=125_000, bytes_down=250_000, up_bps=1e6, down_bps=4e6,
    )  # fmt: skip
    assert (time.train_s, time.up_s, time.down_s) == pytest.approx((2.0, 1.0, 0.5))
    assert time.total_s == pytest.approx(3.5)
    assert time.link_s == pytest.approx(1.5)


def test_an_unknown_link_costs_nothing() -> None:
    assert link_s(10**9, None) == 0.0


def test_bytes_grow_with_depth_and_bits() -> None:
    shape = encoder()
    sizes = [update_bytes(shape, LORA, depth, "int8") for depth in range(7)]
    assert sizes == sorted(set(sizes))
    values = shape.layers * shape.lora_values(LORA.rank) + shape.dense_values()
    assert update_bytes(shape, LORA, 6, "fp32") == pytest.approx(4 * values, rel=0.02)
    assert update_bytes(shape, LORA, 6, "int8") == pytest.approx(values, rel=0.1)
    assert version_bytes(shape, LORA) == pytest.approx(2 * values, rel=0.03)


def test_depth_0_is_the_head_alone() -> None:
    shape = encoder()
    assert 4 * shape.dense_values() < update_bytes(shape, LORA, 0, "fp32") < 4 * shape.dense_values() + 1500


def test_a_codec_without_a_cost_is_named() -> None:
    with pytest.raises(MechanismError, match=r"'zip'.*fp32, fp16, int8"):
        update_bytes(encoder(), LORA, 1, "zip")
