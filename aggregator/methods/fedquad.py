"""FedQuad: each device's LoRA depth by its pace, quantized activations where memory asks for them.

After FedQuad (arXiv 2506.01001), reconstructed from its abstract: the depth and the number of quantized
layers are the paper's; the greedy sweep, the outputs that are made again rather than kept, the int8 updates
and the per-layer mean are ours.
"""

from aggregator.merging.layer_mean import LayerMean
from aggregator.methods.base import Method
from aggregator.planner.allocation import GreedyDepth
from edge_sdk.protocol.spec import Levers

__all__ = ["METHOD"]

METHOD = Method(
    name="fedquad",
    allocation=GreedyDepth(),
    merge=LayerMean(),
    levers=Levers(activation_bits=8, recompute="outputs"),
    other_levers=(
        Levers(activation_bits=4, activation_rounding="stochastic", recompute="outputs"),
        Levers(activation_bits=8, recompute="inner"),
        Levers(activation_bits=8, recompute="layer"),
    ),
    codec="int8",
    error_feedback=True,
    summary="depth by pace, int8 activations where memory asks for them, int8 updates with error feedback",
)
