"""A claim of the paper, its evidence, and the registry of claims: each is declared once, where its statistics are computed.

Who judges a claim (figures.paper.judge), writes it on the page (figures.paper.page) or into the report (figures.paper.report)
knows it from here alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from figures.paper.selection import Tables


@dataclass
class Part:
    """A statistic: `values` [seeds or pairs], and where it is a mean over images `images` [images], averaged over seeds.

    It is signed so that above 0 is what the paper says; `unit` is the unit of the values.
    margin: the smallest effect that matters, in `unit`; NaN where the rule has none.
    """

    name: str
    statistic: str
    unit: str
    values: np.ndarray
    images: np.ndarray | None = None
    number_of_images: int = 0
    margin: float = math.nan


@dataclass
class Evidence:
    """The parts of a claim, and a sentence for each run or pair that was left out."""

    parts: list[Part] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


Collect = Callable[
    [Tables, pd.DataFrame], Evidence
]  # tables of a study, its rows of RUNS by `selection.scope` -> evidence


@dataclass(frozen=True)
class Claim:
    """What the paper says, as a sentence, and how its evidence is collected from the tables of a study.

    decides: the name of the primary part, which alone decides the claim; empty where all parts decide it together.
    """

    name: str
    sentence: str
    collect: Collect
    decides: str = ""


# Scale that has claims of its own, or "" for all other scales -> name -> claim, in the order of the page.
CLAIMS_OF: dict[str, dict[str, Claim]] = {"": {}}


def claim(name: str, sentence: str = "", scale: str = "", decides: str = "") -> Callable[[Collect], Collect]:
    """Declare a claim on the function that collects its evidence. Its docstring gives formula, unit and sign of each part.

    sentence: what the paper says; by default the sentence of the claim of this name that is declared for all scales.
    scale: the only scale that the claim is for; a scale with claims of its own has no others. decides: as in `Claim`.
    Raises ValueError for a name that is taken, and for a claim without a sentence or without a docstring.
    """

    def declare(collect: Collect) -> Collect:
        of_scale = CLAIMS_OF.setdefault(scale, {})
        if name in of_scale:
            raise ValueError(f"there is a claim {name!r} already: {of_scale[name].sentence}")
        of_all = CLAIMS_OF[""].get(name)
        said = sentence or (of_all.sentence if of_all else "")
        if not said:
            raise ValueError(f"claim {name!r} has no sentence")
        if not collect.__doc__:
            raise ValueError(f"claim {name!r}: its function needs a docstring with formula, unit and sign of each part")
        of_scale[name] = Claim(name, said, collect, decides)
        return collect

    return declare


def claims_of(scale: str) -> dict[str, Claim]:
    """The claims that a study of a scale is judged by, by name."""
    return CLAIMS_OF.get(scale) or CLAIMS_OF[""]
