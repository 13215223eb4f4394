"""The instrument: does a vision transformer keep looking locally while it learns class after class, and does it pay?

Public names are loaded when they are asked for, so that importing the package waits neither for torch nor for pandas.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cil.lazy import names_of

if TYPE_CHECKING:
    from locality_probe.doctor import examine as examine
    from locality_probe.heatmap import HeatMaps as HeatMaps
    from locality_probe.heatmap import heat_maps as heat_maps
    from locality_probe.images import load_images as load_images
    from locality_probe.log import LocalityLog as LocalityLog
    from locality_probe.measures import MEASURES as MEASURES
    from locality_probe.measures import distances as distances
    from locality_probe.measures import measure_attention as measure_attention
    from locality_probe.measures import nonlocality as nonlocality
    from locality_probe.measures import positions as positions
    from locality_probe.measures import uniform_nonlocality as uniform_nonlocality
    from locality_probe.plan import make_plan as make_plan
    from locality_probe.probe import Measurement as Measurement
    from locality_probe.probe import Probe as Probe
    from locality_probe.record import Layer as Layer
    from locality_probe.record import Maps as Maps
    from locality_probe.record import Recorder as Recorder
    from locality_probe.subject import Subject as Subject
    from locality_probe.subject import from_file as from_file
    from locality_probe.subject import from_hf as from_hf
    from locality_probe.subject import from_run as from_run
    from locality_probe.subject import from_timm as from_timm
    from locality_probe.subject import from_torchvision as from_torchvision
    from locality_probe.typed import LIBRARIES as LIBRARIES

__version__ = "0.1.0"

# Public name -> the module of this package that has it. The function `record` is in the package of that name alone.
PUBLIC = {
    "HeatMaps": "heatmap",
    "LIBRARIES": "typed",
    "Layer": "record",
    "LocalityLog": "log",
    "MEASURES": "measures",
    "Maps": "record",
    "Measurement": "probe",
    "Probe": "probe",
    "Subject": "subject",
    "distances": "measures",
    "examine": "doctor",
    "from_file": "subject",
    "from_hf": "subject",
    "from_run": "subject",
    "from_timm": "subject",
    "from_torchvision": "subject",
    "heat_maps": "heatmap",
    "load_images": "images",
    "make_plan": "plan",
    "measure_attention": "measures",
    "nonlocality": "measures",
    "positions": "measures",
    "uniform_nonlocality": "measures",
    "Recorder": "record",
}
__all__ = list(PUBLIC)

__getattr__, __dir__ = names_of(__name__, PUBLIC)
