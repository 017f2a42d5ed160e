"""FedAvg of LoRA adapters: every device trains every layer, plain; updates travel whole.

Communication-Efficient Learning of Deep Networks from Decentralized Data, McMahan et al., 2017. At equal
depths the per-layer mean is FedAvg's sample-weighted mean.
"""

from aggregator.merging.layer_mean import LayerMean
from aggregator.methods.base import Method
from aggregator.planner.allocation import FullDepth

__all__ = ["METHOD"]

METHOD = Method(
    name="fedavg",
    allocation=FullDepth(),
    merge=LayerMean(),
    codec="fp32",
    error_feedback=False,
    summary="full depth, plain activations, fp32 updates",
)
