"""Frozen weights below 16 bits: how far off, how many bytes, and both directions of the product."""

from __future__ import annotations

import subprocess
from functools import cache

import pytest

torch = pytest.importorskip("torch")

from edge_sdk.errors import MechanismError  # noqa: E402
from edge_sdk.planning.precision import held_bytes  # noqa: E402
from edge_sdk.protocol.base_plan import BASE_WORDS  # noqa: E402
from edge_sdk.training.model.folding import refuse_fold  # noqa: E402
from edge_sdk.training.model.linear import LoraLinear  # noqa: E402
from edge_sdk.training.precision import kernels, weights  # noqa: E402
from edge_sdk.training.precision.holding import (  # noqa: E402
    available,
    base_precision,
    compute_dtype,
    hold,
    told,
)
from edge_sdk.training.precision.nf4 import LEVELS, Nf4  # noqa: E402
from edge_sdk.training.precision.weights import Dense  # noqa: E402

pytestmark = pytest.mark.train
torch.set_num_threads(1)
CPU = torch.device("cpu")
WORDS = ("fp32", "bf16", "fp16", "int8", "nf4", "int2")
PACKED = ("int8", "nf4", "int2")
BOUNDS = {"fp32": 0.0, "bf16": 3e-3, "fp16": 4e-4, "int8": 0.0065, "nf4": 0.095, "int2": 0.33}


def normal(rows=96, width=256, seed=0, scale=0.03):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * scale


def error(made, wanted):
    return float((made - wanted).norm() / wanted.norm())


@pytest.fixture
def in_torch(monkeypatch):
    monkeypatch.setattr(kernels, "uses_bitsandbytes", lambda word, device: False)


@pytest.mark.parametrize("scale", [1e-9, 0.03, 1e6])
@pytest.mark.parametrize("word", WORDS)
def test_relative_error_on_normal_weights(word, scale):
    if word == "fp16" and scale != 0.03:
        pytest.skip("outside float16's range")
    weight = normal(256, 512, scale=scale)
    assert error(hold(weight, word, CPU).dense(), weight) <= BOUNDS[word]


@pytest.mark.parametrize("word", PACKED)
def test_an_outlier_spoils_its_own_block_alone(word):
    weight = normal()
    made = hold(weight, word, CPU).dense()
    weight[3, 70] = 50.0
    spoiled = hold(weight, word, CPU).dense()
    assert torch.equal(spoiled[:3], made[:3]) and torch.equal(spoiled[4:], made[4:])
    if word != "int2":  # whose scales share a factor along the row
        assert torch.equal(spoiled[3, :64], made[3, :64]) and torch.equal(spoiled[3, 128:], made[3, 128:])


@pytest.mark.parametrize("shape", [(96, 256), (7, 96), (5, 30), (1, 1)])
@pytest.mark.parametrize("word", WORDS)
def test_bytes_are_those_of_the_storages_and_as_planned(word, shape):
    held = hold(normal(*shape), word, CPU)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in
                [*held.buffers(), *held.parameters()]}  # fmt: skip
    assert held.nbytes == sum(storages.values()) == held_bytes(word, *shape)
    assert held.dense().shape == shape


def test_bits_a_weight_scales_included():
    sizes = {word: 8 * hold(normal(256, 2048), word, CPU).nbytes / (256 * 2048) for word in PACKED}
    assert sizes == pytest.approx({"int8": 8.25, "nf4": 4.25, "int2": 2.266}, abs=1e-3)


@pytest.mark.parametrize("word", WORDS)
def test_parts_are_parts_of_the_whole(word):
    held = hold(normal(40, 200), word, CPU)
    whole = held.dense()
    assert torch.equal(held.dense_rows(3, 17), whole[3:17])
    assert torch.equal(held.block(slice(2, 9), slice(64, 200), torch.float32), whole[2:9, 64:200])
    assert torch.equal(held.block(slice(0, 40), slice(128, 192), torch.float32), whole[:, 128:192])
    if word in PACKED:
        ids = torch.tensor([5, 0, 5, 39])
        assert torch.equal(held.gather(ids), whole[ids])
        assert torch.equal(held.gather(ids, torch.bfloat16), whole[ids].bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("word", WORDS)
def test_both_directions_are_those_of_the_dense_weight_and_hold_a_block_at_most(word, dtype, monkeypatch):
    monkeypatch.setattr(weights, "BLOCK_BYTES", 40_000)
    held = hold(normal(130, 320), word, CPU)
    x, grad, bias = normal(6, 320, 1).to(dtype), normal(6, 130, 2).to(dtype), normal(1, 130, 3)[0].to(dtype)
    whole = held.dense(dtype)
    seen = []
    block = type(held).block
    monkeypatch.setattr(
        type(held), "block", lambda *args: seen.append(made := block(*args)) or made, raising=True
    )
    near = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    assert error(held(x, bias), torch.nn.functional.linear(x, whole, bias)) <= near
    assert error(held(x.view(2, 3, 320)).view(6, 130), x @ whole.t()) <= near
    assert error(held.input_grad(grad), grad @ whole) <= near
    packed = word in PACKED or dtype != whole.dtype
    assert not packed or len(seen) > 5
    assert all(one.numel() * one.element_size() <= 41_600 for one in seen)


@pytest.mark.parametrize("word", WORDS)
def test_lora_gradients_are_those_beside_the_dense_weight(word):
    weight, x = normal(48, 128), normal(10, 128, 1, 1.0)
    held = hold(weight, word, CPU)
    gradients = []
    for frozen in (held, Dense(held.dense())):
        linear = LoraLinear(frozen, normal(1, 48, 2)[0], rank=4, scaling=2.0)
        with torch.no_grad():
            linear.A.copy_(normal(*linear.A.shape, 3, 0.1))
            linear.B.copy_(normal(*linear.B.shape, 4, 0.1))
        linear.tune("AB")
        entered = x.clone().requires_grad_()
        left = linear(entered)
        left.square().sum().backward()
        gradients.append((left.detach(), entered.grad, linear.A.grad, linear.B.grad))
    for ours, dense in zip(*gradients, strict=True):
        assert torch.equal(ours, dense)


@pytest.mark.parametrize("word", PACKED)
def test_without_lora_the_gradient_passes_through_and_nothing_is_kept(word):
    held = hold(normal(48, 128), word, CPU)
    x = normal(10, 128, 1).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = held(x)
    y.sum().backward()
    assert not kept
    assert error(x.grad, torch.ones(10, 48) @ held.dense()) < 1e-6


@pytest.mark.parametrize("word", PACKED)
def test_a_model_that_is_converted_leaves_what_is_held_alone(word):
    net = torch.nn.Sequential(hold(normal(), word, CPU))
    before, size = net[0].dense(), net[0].nbytes
    for convert in (net.bfloat16, net.float, net.half):
        convert()
        assert torch.equal(net[0].dense(), before) and net[0].nbytes == size
    assert not list(net.parameters()) and not net.state_dict()


@pytest.mark.parametrize("word", PACKED)
def test_weights_of_any_kind_are_held(word):
    assert torch.equal(hold(torch.zeros(4, 70), word, CPU).dense(), torch.zeros(4, 70))
    same = hold(torch.full((4, 70), 0.5), word, CPU).dense()
    assert torch.allclose(same, torch.full((4, 70), 0.5), rtol=5e-3)
    turned = normal(256, 96).t()  # as GPT-2 lays them
    assert torch.equal(hold(turned, word, CPU).dense(), hold(turned.contiguous(), word, CPU).dense())
    half = normal().bfloat16()
    assert torch.equal(hold(half, word, CPU).dense(), hold(half.float(), word, CPU).dense())
    mixed = normal()
    mixed[::2] *= 1e-7
    assert error(hold(mixed, word, CPU).dense()[1::2], mixed[1::2]) <= BOUNDS[word] + 0.01


def test_sixteen_bits_keep_what_they_are_given():
    assert hold(normal().bfloat16(), "fp16", CPU).word == "bf16"
    assert hold(normal(), "fp16", CPU).word == "fp16"
    assert hold(normal(scale=1e6), "fp16", CPU).word == "bf16"


def test_least_squares_beat_the_other_ways_to_two_bits():
    weight = normal(256, 512)
    blocks = weight.view(-1, 64)
    low, high = blocks.amin(1, True), blocks.amax(1, True)
    ends = ((blocks - low) / (high - low) * 3).round() / 3 * (high - low) + low
    levels = torch.tensor([-0.64, -0.19, 0.19, 0.64])
    most = blocks.abs().amax(1, True)
    largest = levels[torch.bucketize(blocks / most, (levels[1:] + levels[:-1]) / 2)] * most
    ours = error(hold(weight, "int2", CPU).dense(), weight)
    assert ours < error(largest.view_as(weight), weight) < error(ends.view_as(weight), weight)


def test_nf4_lies_and_reads_as_bitsandbytes_has_it(in_torch):
    if kernels._trial("cpu")[1]:
        pytest.skip(f"bitsandbytes: {kernels._trial('cpu')[1]}")
    ops = kernels._operators()
    weight = normal(300, 640)
    theirs, most = ops.quantize_4bit(weight, 64, "nf4", torch.uint8)
    ours = Nf4.encode(weight)
    assert torch.equal(ours.codes.flatten(), theirs.flatten())
    scales = ours.block_scales(slice(None), slice(None))
    assert torch.allclose(scales.flatten(), most, rtol=6e-4)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        made = ops.dequantize_4bit(theirs, scales.flatten(), 64, "nf4", weight.shape, dtype)
        assert torch.equal(made, ours.dense(dtype))
        assert torch.equal(kernels.dequantize_nf4(ours.codes, scales, 64, dtype), made)


def test_int8_reads_as_bitsandbytes_has_it(in_torch):
    if kernels._trial("cpu")[1]:
        pytest.skip(f"bitsandbytes: {kernels._trial('cpu')[1]}")
    ours = hold(normal(300, 640), "int8", CPU)
    scales = ours.block_scales(slice(None), slice(None))
    assert torch.equal(kernels.dequantize_int8(ours.codes, scales, 64, torch.float32), ours.dense())


def test_the_published_levels():
    assert len(LEVELS) == 16 and list(LEVELS) == sorted(LEVELS) and LEVELS[7] == 0.0


@pytest.fixture
def fresh_trial(monkeypatch):
    """What was found out for other tests is left to them."""
    monkeypatch.setattr(kernels, "_trial", cache(kernels._trial.__wrapped__))


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ((-4, "", ""), "killed by signal 4"),
        ((1, "", "Traceback\nOSError: libcudart.so.12: no such file"), "OSError: libcudart"),
        (OSError("no memory"), "could not be tried: OSError"),
        (subprocess.TimeoutExpired("python", 1), "could not be tried: TimeoutExpired"),
    ],
    ids=["illegal-instruction", "library", "spawn", "hangs"],
)
def test_where_bitsandbytes_does_not_run_torch_reads_the_same(end, reason, monkeypatch, fresh_trial):
    held = hold(normal(), "nf4", CPU)
    levels = torch.tensor(LEVELS)

    def run(command, **options):
        if isinstance(end, Exception):
            raise end
        return subprocess.CompletedProcess(command, end[0], end[1], end[2])

    monkeypatch.setattr(kernels.subprocess, "run", run)
    assert kernels.why_not("nf4", CPU).find(reason) >= 0
    assert kernels.implementation("nf4", CPU) == "torch" and told("nf4", CPU) == "nf4 by torch"
    assert available("nf4", CPU) is None
    both = torch.stack([held.codes >> 4, held.codes & 15], dim=-1).view(held.out_features, -1, 64)
    wanted = levels[both.long()] * held.block_scales(slice(None), slice(None)).unsqueeze(-1)
    assert torch.equal(held.dense(), wanted.flatten(1))


def test_without_bitsandbytes_nothing_is_started(monkeypatch, fresh_trial):
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(kernels.subprocess, "run", lambda *a, **k: pytest.fail("started"))
    assert kernels.why_not("nf4", CPU) == "it is not installed"
    assert "torch decodes int8 on cpu" in kernels.why_not("int8", CPU)
    assert kernels.implementation("int8", CPU) == "torch"


def test_every_precision_is_to_be_had_here_and_others_say_why():
    assert [available(word, "cpu") for word in BASE_WORDS] == [None] * len(BASE_WORDS)
    assert "no such precision" in available("int3", "cpu")
    if not torch.cuda.is_available():
        assert available("nf4", "cuda") is not None
        with pytest.raises(MechanismError, match="nf4 is not to be had on cuda"):
            base_precision("nf4", "cuda")
    assert compute_dtype("nf4", CPU) == torch.float32 and compute_dtype("bf16", CPU) == torch.bfloat16


def test_a_kernel_that_gives_nonsense_is_refused(monkeypatch):
    from edge_sdk.training.precision import holding

    holding._tried.cache_clear()
    monkeypatch.setattr(Dense, "input_grad", lambda self, grad: grad * float("nan"))
    assert "gives nan" in available("bf16", "cpu")
    holding._tried.cache_clear()


def test_folding_into_a_packed_base_is_refused_with_the_reason():
    refuse_fold([hold(normal(), "bf16", CPU), hold(normal(), "fp32", CPU)])
    with pytest.raises(MechanismError, match=r"folded into a base held in nf4.*round most of it away"):
        refuse_fold([hold(normal(), "fp32", CPU), hold(normal(), "nf4", CPU)])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("word", PACKED)
def test_on_cuda_the_same_bytes_and_the_same_values(word):
    weight = normal(300, 640)
    here, there = hold(weight, word, CPU), hold(weight, word, torch.device("cuda"))
    assert torch.equal(here.codes, there.codes.cpu())
    assert torch.allclose(here.dense(), there.dense().cpu(), rtol=1e-6, atol=0)
