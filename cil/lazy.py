"""Public names of a package that are loaded when they are asked for, so that importing it does not wait for torch."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping


def names_of(package: str, public: Mapping[str, str]) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package (PEP 562); public: name -> the module of the package that has it.

    No name may be that of a module or package in there: which of the two an import then gave would depend on what was
    imported before.
    """

    def load(name: str) -> object:
        if name not in public:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{public[name]}"), name)

    return load, lambda: sorted({*vars(sys.modules[package]), *public})
