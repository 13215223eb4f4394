"""The paper's claims: their statistics, declared in figures.paper.claim's registry, and judged by figures.paper.judge.

A new claim is one function with @claim(name, sentence) in one of these files, or anywhere else.
"""

from __future__ import annotations

import pandas as pd

from figures.paper import judge as rules
from figures.paper.claim import CLAIMS_OF, claims_of
from figures.paper.claims import general, registered  # each declares its claims; the sentences are those of `general`
from figures.paper.selection import Tables

__all__ = ["CLAIMS_OF", "claims_of", "general", "judge", "registered"]


def judge(tables: Tables) -> pd.DataFrame:
    """The table CLAIMS of a study, by the claims of its scale."""
    runs = tables["runs.csv"]
    return rules.judge(tables, claims_of(runs["scale"].iloc[0] if len(runs) else ""))
