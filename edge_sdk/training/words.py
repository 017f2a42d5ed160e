"""The mechanisms that this trainer has, by the words of ``TrainSpec.needs()`` and ``Candidate.needs()``.

No torch here: a word is known without loading a model.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

from msgspec import structs

from edge_sdk.errors import MechanismError
from edge_sdk.protocol.container import CODEC_FORMS
from edge_sdk.protocol.spec import Candidate, Levers, TrainSpec

__all__ = ["MECHANISMS", "mechanisms_of", "refuse_missing", "refuse_missing_levers"]

MECHANISMS: tuple[str, ...] = (
    "activation:int2",
    "activation:int4",
    "activation:int8",
    "attention:sdpa",
    "base:fp32",
    *(f"codec:{name}" for name in sorted(CODEC_FORMS)),
    "error-adapter:none",
    "error-feedback:on",
    "factors:A",
    "factors:AB",
    "factors:B",
    "fold:low-rank",
    "fold:none",
    "objective:cross_entropy",
    "optimizer:adamw",
    "optimizer:adamw8bit",
    "optimizer:sgd",
    "padding:max_length",
    "phases:single",
    "prefix:fp16",
    "prefix:int8",
    "privacy:none",
    "recompute:inner",
    "recompute:layer",
    "recompute:none",
    "recompute:outputs",
    "reinit:each-round",
    "reinit:none",
    "rounding:nearest",
    "rounding:stochastic",
    "schedule:linear",
)


_FOLD = "fold:low-rank"
_FLOATS = ("fp32", "bf16", "fp16")
"""Bases that something can be folded into: a packed weight lies on its quantizer's grid."""
_PAGED = "optimizer:paged-adamw8bit"


def mechanisms_of(base_precision: str, device: str = "cpu") -> tuple[str, ...]:
    """The mechanisms of a trainer on ``device`` whose base is held so: what its owner chose, and no other."""
    words = [word for word in MECHANISMS if not word.startswith("base:")]
    if base_precision not in _FLOATS:
        words.remove(_FOLD)
    if device.startswith("cuda") and find_spec("bitsandbytes") is not None:
        words.append(_PAGED)
    return tuple(sorted([f"base:{base_precision}", *words]))


def refuse_missing(spec: TrainSpec, candidate: Candidate | None = None, base_precision: str = "fp32") -> None:
    """Raises MechanismError naming every mechanism that is asked for and not had here.

    A paged optimizer, which depends on the device, is refused where it is made, with the reason.
    """
    needs: Iterable[str] = spec.needs() | (candidate.needs() if candidate else frozenset())
    missing = sorted(set(needs) - set(mechanisms_of(base_precision)) - {_PAGED})
    if spec.dropout:
        missing.append(f"dropout:{spec.dropout}")
    if missing == [_FOLD]:
        raise MechanismError(
            f"the run folds what it learned into the base, and this one is held in {base_precision}: "
            "quantizing the sum anew would round most of it away",
            "hold the base in fp32, bf16 or fp16 here, or choose another merge rule in run.toml",
        )
    if missing:
        raise MechanismError(
            f"this trainer has no mechanism {', '.join(missing)}",
            "update edge-sdk on the device, or choose another method in run.toml",
        )


def refuse_missing_levers(levers: Levers) -> None:
    """Likewise for the levers of a probe."""
    refuse_missing(TrainSpec(), Candidate(id="probe", depth=1, quantized_layers=1, **structs.asdict(levers)))
