"""Methods whose result depends on nothing that is measured: every device trains all layers, every time."""

from aggregator.merging.layer_mean import LayerMean
from aggregator.methods.base import Method
from aggregator.planner.allocation import FullDepth

PLAIN = Method(name="full-plain-int8", allocation=FullDepth(), merge=LayerMean(), codec="int8")
HALF = Method(name="full-fp16", allocation=FullDepth(), merge=LayerMean(), codec="fp16")
WHOLE = Method(name="full-fp32", allocation=FullDepth(), merge=LayerMean(), codec="fp32")
METHOD = Method(
    name="full-int8", allocation=FullDepth(), merge=LayerMean(), codec="int8", error_feedback=True
)
