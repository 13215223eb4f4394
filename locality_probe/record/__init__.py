"""Run a model once and see the attention of each layer at its real input, whatever the model, one layer at a time.

Layers that offer `attention_map` (ours) are asked. In any other model a TorchFunctionMode sees
`F.scaled_dot_product_attention` while it stays fused, nn.MultiheadAttention, and where a layer writes attention out, the
softmax that is then multiplied with the values.
"""

from locality_probe.record.entry import evaluating, plain, record, watching
from locality_probe.record.layer import AttentionLayer, Layer, Recorded
from locality_probe.record.maps import Maps, Measure, Reader, Visitor
from locality_probe.record.sdpa import Scores, fused_map
from locality_probe.record.watch import Watch

__all__ = [
    "AttentionLayer", "Layer", "Maps", "Measure", "Reader", "Recorded", "Scores", "Visitor", "Watch", "evaluating",
    "fused_map", "plain", "record", "watching",
]  # fmt: skip
