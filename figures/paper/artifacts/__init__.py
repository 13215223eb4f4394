"""What each figure and table of the paper gathers from a study's tables: one file per family of pictures.

Importing this package declares them all in figures.paper.artifact's registry.
"""

from figures.paper.artifact import ARTIFACTS, Artifact, Built, NotRun, artifact, build, in_section, planned_order
from figures.paper.artifacts import accuracy, attention, distances, spectra, sweeps, tables, transfer

__all__ = [
    "ARTIFACTS", "Artifact", "Built", "NotRun", "accuracy", "artifact", "attention", "build", "distances", "in_section",
    "planned_order", "spectra", "sweeps", "tables", "transfer",
]  # fmt: skip
