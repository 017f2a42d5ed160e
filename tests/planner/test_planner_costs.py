import random
from itertools import pairwise

import msgspec
import pytest
from planner_cases import a_fit, a_run, a_status

from aggregator.methods.fedquad import METHOD as FEDQUAD
from aggregator.planner.costs import DeviceCosts, Work, device_costs, frontier, layer_gains
from edge_sdk.protocol.wire import Status


def costs(status: Status, layers: int = 6) -> DeviceCosts:
    return device_costs(status, Work.of(a_run(layers), steps=10, levers=FEDQUAD.levers, codec="int8"))


def test_a_depth_gets_the_fewest_quantized_layers_with_which_it_fits() -> None:
    # 135 MB: depth 3 needs 130; 4: 170 - 25 a; 5: 210 - 25 a; 6: 250 - 25 a
    pairs = frontier(costs(a_status(fit=a_fit(), budget_mb=150)))
    assert [(p.depth, p.quantized) for p in pairs] == [(1, 0), (2, 0), (3, 0), (4, 2), (5, 3), (6, 5)]


def test_the_frontier_ends_where_nothing_helps() -> None:
    pairs = frontier(costs(a_status(fit=a_fit(), budget_mb=75)))
    assert [(p.depth, p.quantized) for p in pairs] == [(1, 0), (2, 1), (3, 3)]
    assert frontier(costs(a_status(fit=a_fit(), budget_mb=20))) == ()


@pytest.mark.parametrize(
    "status",
    [
        a_status(fit=a_fit(saved=0, kinds=(0,)), budget_mb=150),
        a_status(fit=a_fit(), budget_mb=150, mechanisms=("codec:int8",)),
    ],
    ids=["never probed", "no such mechanism"],
)
def test_nothing_is_quantized_where_it_is_unknown_or_missing(status: Status) -> None:
    device = costs(status)
    assert [(p.depth, p.quantized) for p in frontier(device)] == [(1, 0), (2, 0), (3, 0)]
    assert device.most_quantized(6) == 0


def test_without_a_plain_probe_all_layers_are_quantized() -> None:
    pairs = frontier(costs(a_status(fit=a_fit(kinds=(1,)))))
    assert [(p.depth, p.quantized) for p in pairs] == [(d, d) for d in range(1, 7)]


def test_a_pair_that_takes_as_long_as_a_deeper_one_is_dropped() -> None:
    flat = msgspec.structs.replace(a_fit(), layer_s=0.0)
    assert [(p.depth, p.quantized) for p in frontier(costs(a_status(fit=flat)))] == [(6, 0)]


def test_frontiers_are_feasible_minimal_and_strictly_growing() -> None:
    random_ = random.Random(1)
    for _ in range(300):
        layer = random_.uniform(1, 80)
        fit = a_fit(
            random_.uniform(0.1, 5),
            head=random_.uniform(0, 30),
            layer=layer,
            saved=random_.uniform(0, layer),
            work=random_.uniform(0, 30),
            quantize=random_.uniform(0, 0.2),
        )
        budget = random_.uniform(0, 400)
        device = costs(
            a_status(fit=fit, budget_mb=budget, up_bps=random_.choice([None, random_.uniform(1e4, 1e7)]))
        )
        pairs = frontier(device)
        for pair in pairs:
            assert pair.peak_mb == device.peak_mb(pair.depth, pair.quantized) <= 0.9 * budget
            assert all(device.peak_mb(pair.depth, a) > 0.9 * budget for a in range(pair.quantized))
        for low, high in pairwise(pairs):
            assert low.depth < high.depth
            assert low.seconds < high.seconds


def test_a_status_without_a_fit_for_this_run_is_said() -> None:
    with pytest.raises(ValueError, match="not reported a probe"):
        costs(a_status())
    with pytest.raises(ValueError, match="batch 4 and length 32"):
        costs(a_status(fit=a_fit(micro_batch=4)))


def test_gains_count_from_the_output() -> None:
    assert layer_gains(4, None) == (0, 0.25, 0.5, 0.75, 1)
    assert layer_gains(4, [0, 1, 2, 5]) == pytest.approx((0, 5 / 8, 7 / 8, 1, 1))
    assert layer_gains(2, [0, 0]) == (0, 0.5, 1)
    for bad in ([1.0], [1.0, -1.0], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="2 finite utilities"):
            layer_gains(2, bad)
