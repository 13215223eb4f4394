"""Run a model and see the attention of each layer at its real input, whatever the model, one layer at a time.

Layers that offer `attention_map` (ours) are asked. In any other model a TorchDispatchMode sees the operators that attention
is made of (sdpa.py, eager.py, kernels.py), and an experiment shows where the tokens are (experiment.py, places.py).
"""

from locality_probe.record.entry import Recorder, evaluating, plain, record
from locality_probe.record.layer import AttentionLayer, Layer, Recorded
from locality_probe.record.maps import Maps, Measure, Reader, Visitor
from locality_probe.record.observer import Grids
from locality_probe.record.sdpa import Scores, fused_map
from locality_probe.record.watch import Watch

__all__ = [
    "AttentionLayer", "Grids", "Layer", "Maps", "Measure", "Reader", "Recorded", "Recorder", "Scores", "Visitor", "Watch",
    "evaluating", "fused_map", "plain", "record",
]  # fmt: skip
