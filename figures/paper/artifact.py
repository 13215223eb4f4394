"""The registry of the paper's figures and tables: each is declared once, where it is gathered from a study's tables.

The plan (figures.paper.plan), `--only`, the page (figures.paper.page) and the report (figures.paper.report) know a figure from
here alone. A new one is its drawing module and one function with @artifact.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from figures.paper.scales import RunKey, Runs
from figures.paper.selection import Tables


class NotRun(ValueError):
    """The study holds nothing that this could be drawn from."""


# Tables of a study -> what is drawn, as a tidy frame; the drawing, a Figure or Markdown; and the names of the runs behind it.
Gather = Callable[[Tables], tuple[pd.DataFrame, Figure | str, Iterable[str]]]
Needs = Callable[[Runs], list[RunKey]]

# Of the report, in its order. Those before "tables" are pictures; a table has the columns of figures.paper_tables.
SECTIONS = ("distances", "accuracy", "attention", "spectra", "transfer", "sweeps", "tables")


@dataclass(frozen=True)
class Artifact:
    """A figure or table of the paper.

    needs: the runs of a scale that it rests on. kinds: the measurements of them that it shows, beside accuracy; in this order
    they are planned. section: where the report has it.
    """

    name: str
    title: str
    build: Gather
    needs: Needs
    kinds: tuple[str, ...]
    section: str

    def planned(self, scale: str) -> list[tuple[str, int, str]]:
        """(recipe, seed, kind of measurement) of all that it rests on; its accuracy belongs to every run."""
        runs = self.needs(Runs(scale))
        return list(dict.fromkeys((*key, kind) for kind in (*self.kinds, "accuracy") for key in runs))


ARTIFACTS: dict[str, Artifact] = {}  # in the order in which they are declared


def artifact(
    name: str, title: str, *, needs: Needs, kinds: tuple[str, ...] = (), section: str
) -> Callable[[Gather], Gather]:
    """Declare a figure or table on the function that gathers it from a study's tables, and raises NotRun if it cannot.

    Raises ValueError for a name that is taken and for an unknown section.
    """

    def declare(build: Gather) -> Gather:
        if name in ARTIFACTS:
            raise ValueError(f"there is a figure or table {name!r} already: {ARTIFACTS[name].title}")
        if section not in SECTIONS:
            raise ValueError(f"the report has no section {section!r}; there are: {', '.join(SECTIONS)}")
        ARTIFACTS[name] = Artifact(name, title, build, needs, kinds, section)
        return build

    return declare


def in_section(section: str) -> list[str]:
    """Names of the artifacts of a section of the report, as they are declared."""
    return [name for name, declared in ARTIFACTS.items() if declared.section == section]


def planned_order() -> list[str]:
    """Names of all artifacts as the plan has them: the paper's figures by number, what the paper has not, the tables."""

    def place(name: str) -> tuple[int, int]:
        number = re.fullmatch(r"(?:fig|table)(\d+)", name)
        if ARTIFACTS[name].section == "tables":
            return 2, int(number[1]) if number else 0
        return (0, int(number[1])) if number else (1, 0)

    return sorted((name for section in SECTIONS for name in in_section(section)), key=place)


Built = dict[str, tuple[pd.DataFrame, Figure | str, list[str]] | NotRun]


def build(tables: Tables, names: Iterable[str] | None = None) -> Built:
    """Each of ARTIFACTS, or of those in `names`: its frame, drawing and runs, or why there is none."""
    built: Built = {}
    for name in planned_order() if names is None else names:
        try:
            frame, drawn, runs = ARTIFACTS[name].build(tables)
            built[name] = frame, drawn, list(dict.fromkeys(runs))
        except NotRun as error:
            built[name] = error
    return built
