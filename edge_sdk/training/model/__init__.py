"""The resident model: found by structure, LoRA in its linears, its adapter set and read by part keys."""

from edge_sdk.training.model.loading import load_model
from edge_sdk.training.model.tunable import TunableModel

__all__ = ["TunableModel", "load_model"]
