"""The trainer: class-incremental training of vision transformers, with Locality-Preserved Attention (LPA).

Public names are loaded when they are asked for, so that importing the package does not wait for torch. The function `train`
is in the module `cil.train`, which has the same name: `from cil.train import train`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cil.lazy import names_of

if TYPE_CHECKING:
    from cil.attention import ATTENTION as ATTENTION
    from cil.attention import GPSA as GPSA
    from cil.attention import LPA as LPA
    from cil.attention import SelfAttention as SelfAttention
    from cil.attention import TaskAttention as TaskAttention
    from cil.checkpoint import RunDir as RunDir
    from cil.checkpoint import open_run as open_run
    from cil.data import DATASETS as DATASETS
    from cil.data import Dataset as Dataset
    from cil.evaluate import format_scores as format_scores
    from cil.evaluate import scores as scores
    from cil.methods import METHODS as METHODS
    from cil.methods import Method as Method
    from cil.models import IncrementalTimm as IncrementalTimm
    from cil.models import IncrementalViT as IncrementalViT
    from cil.models import create_model as create_model
    from cil.recipes import RECIPES as RECIPES
    from cil.recipes import find as find
    from cil.recipes import recipe as recipe
    from cil.run import Run as Run
    from cil.tables import Table as Table

# Public name -> the module of this package that has it.
PUBLIC = {
    "ATTENTION": "attention",
    "DATASETS": "data",
    "Dataset": "data",
    "GPSA": "attention",
    "IncrementalTimm": "models",
    "IncrementalViT": "models",
    "LPA": "attention",
    "METHODS": "methods",
    "Method": "methods",
    "RECIPES": "recipes",
    "Run": "run",
    "RunDir": "checkpoint",
    "SelfAttention": "attention",
    "Table": "tables",
    "TaskAttention": "attention",
    "create_model": "models",
    "find": "recipes",
    "format_scores": "evaluate",
    "open_run": "checkpoint",
    "recipe": "recipes",
    "scores": "evaluate",
}
__all__ = list(PUBLIC)

__getattr__, __dir__ = names_of(__name__, PUBLIC)
