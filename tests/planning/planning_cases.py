"""A small encoder and a device's fit, as the planning tests know them."""

from edge_sdk.planning.cost import peak_mb, step_s
from edge_sdk.protocol.measure import Fit, ProbePoint
from edge_sdk.protocol.model import DensePart, LoraModule, LoraShape, ModelShape
from edge_sdk.protocol.spec import Candidate, Setting

LORA = LoraShape(rank=8)


def encoder(layers: int = 6, hidden: int = 384) -> ModelShape:
    wide = 4 * hidden
    sizes = [
        ("query", hidden, hidden),
        ("value", hidden, hidden),
        ("up", hidden, wide),
        ("down", wide, hidden),
    ]
    return ModelShape(
        family="bert",
        layers=layers,
        hidden=hidden,
        intermediate=wide,
        heads=12,
        vocabulary=30522,
        layer_path="bert.encoder.layer",
        modules=tuple(LoraModule(name=n, inputs=i, outputs=o) for n, i, o in sizes),
        dense=(
            DensePart(name="classifier.weight", shape=(12, hidden)),
            DensePart(name="classifier.bias", shape=(12,)),
        ),
        parameters=22_000_000,
        base_bytes=88_000_000,
    )


def truth(depth: int, quantized: int) -> ProbePoint:
    """head 10, layer 40, saved 25, work 6 MB; forward 0.1, layer 0.05, quantize 0.01 s."""
    return ProbePoint(
        depth=depth,
        quantized_layers=quantized,
        peak_mb=10 + 40 * depth - 25 * quantized + 6 * (quantized > 0),
        step_s=0.1 + 0.05 * depth + 0.01 * quantized,
    )


ALL_KINDS = ((1, 0), (6, 0), (1, 1), (6, 6))


def fit(*settings: tuple[int, int], micro_batch: int = 16, max_length: int = 32) -> Fit:
    """The truth as a fit, with probes of these kinds."""
    return Fit(
        micro_batch=micro_batch, max_length=max_length, rest_mb=300.0, head_mb=10.0, layer_mb=40.0,
        saved_mb=25.0, work_mb=6.0, forward_s=0.1, layer_s=0.05, quantize_s=0.01,
        probes=tuple(truth(d, a) for d, a in settings or ALL_KINDS),
    )  # fmt: skip


def setting(depth: int, quantized: int = 0, **changed: object) -> Setting:
    fields = {"micro_batch": 16, "max_length": 32, **changed}
    return Setting(depth=depth, quantized_layers=quantized, **fields)  # type: ignore[arg-type]


def peak(model: Fit, depth: int, quantized: int = 0) -> float:
    return peak_mb(model, encoder(), LORA, setting(depth, quantized))


def step(model: Fit, depth: int, quantized: int = 0) -> float:
    return step_s(model, encoder(), LORA, setting(depth, quantized))


def candidate(depth: int, quantized: int = 0, *, layers: int = 6, **changed: object) -> Candidate:
    return Candidate(
        **{
            "id": f"d{depth}a{quantized}",
            "depth": depth,
            "quantized_layers": quantized,
            "micro_batch": 16,
            "max_length": 32,
            "steps": 10,
            "gain": depth / layers,
            **changed,
        }  # type: ignore[arg-type]
    )
