"""The watch: sees every attention while the model runs, and knows whose it is by a stack of the modules that are running."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as modules
from torch.utils._python_dispatch import TorchDispatchMode

from locality_probe.record import kernels, sdpa
from locality_probe.record.asked import offers_map
from locality_probe.record.eager import Products
from locality_probe.record.sighting import Consumer, Sighting

# Ways to see attention in one operator: sees(func, args, kwargs) -> Sighting, or None for an operator of another kind.
BACKENDS: list[Callable[[Any, tuple, dict], Sighting | None]] = [sdpa.sees, kernels.sees]


class Watch(TorchDispatchMode):
    """Sees the operators that a model runs and gives each attention among them to a consumer, under the name of its module.

    It works below Python's functions, where every spelling of attention is one of a few operators: see sdpa.py, eager.py and
    kernels.py. Layers that offer their map (asked) are left to the consumer when they begin, and not watched inside.
    """

    supports_higher_order_operators = True  # flex_attention is one

    def __init__(self, model: nn.Module, consumer: Consumer, asked: Callable[[nn.Module, tuple], None] | None = None):
        super().__init__()
        self.consumer, self.ask = consumer, asked
        self.names = {module: name for name, module in model.named_modules()}
        self.asked = {module for module in self.names if offers_map(module)} if asked else set()
        self.running: list[nn.Module] = []
        self.silent = 0  # how many layers that are asked are running
        self.times: dict[nn.Module, int] = {}
        self.products = Products()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks and mode are on inside; the hooks are those of all modules, so that nothing is written into the model."""
        handles = [
            modules.register_module_forward_pre_hook(self._enter),
            modules.register_module_forward_hook(self._leave, always_call=True),
        ]
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, inputs: tuple) -> None:
        if module not in self.names:
            return
        self.running.append(module)
        if module in self.asked:
            if not self.silent and self.ask is not None:
                with self.paused():
                    self.ask(module, inputs)
            self.silent += 1

    def _leave(self, module: nn.Module, inputs: tuple, output: object) -> None:
        if module not in self.names:
            return
        self.silent -= module in self.asked
        while self.running and self.running.pop() is not module:  # an exception inside leaves its modules
            pass

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        self.silent += 1
        try:
            yield
        finally:
            self.silent -= 1

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> object:
        kwargs = kwargs or {}
        if self.silent or not self.running:
            return func(*args, **kwargs)
        sighting = next((seen for sees in BACKENDS if (seen := sees(func, args, kwargs)) is not None), None)
        if sighting is None and (product := self.products.sees(func, args, kwargs)):
            sighting, began = product
            if (
                sighting.by_name and began not in self.running
            ):  # products of parts that have ended: no attention of this one
                sighting = None
        if sighting is not None:
            return self.consumer(self._name(sighting), sighting, lambda: func(*args, **kwargs))
        result = func(*args, **kwargs)
        self.products.follow(func, args, result, self.running[-1])
        return result

    def _name(self, sighting: Sighting) -> str:
        """The module that is running; the second time that it attends, with #2."""
        module = self.running[-1]
        name = self.names[module] or type(module).__name__
        if sighting.by_name:
            return name
        self.times[module] = self.times.get(module, 0) + 1
        return name if self.times[module] == 1 else f"{name}#{self.times[module]}"

    def kind(self, name: str) -> str:
        """The class of the module that a name of `_name` is of."""
        plain = name.partition("#")[0]
        return next((type(m).__name__ for m, n in self.names.items() if plain in (n, type(m).__name__)), "")


def looks_like_attention(module: nn.Module) -> bool:
    """Whether the class of a module says that it is attention, or the module gives its map."""
    name = type(module).__name__.lower()
    return any(word in name for word in ("attention", "attn", "litemla")) or offers_map(module)


__all__ = ["Tensor", "Watch", "looks_like_attention"]
