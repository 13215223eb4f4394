"""Where tokens are that answer nothing themselves: by the input of their module, whose tokens do.

A layer may compute its queries, or its keys and values, from what is constant in its input (places alone). Then a second
experiment puts noise on the module's own input [B, N, C], which grows with the digits of a token's number, and so shows which
input token each query and key is of; what the image's noise does to the input shows where that token is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from locality_probe.record.experiment import DRAWS, Experiment, Response, Seen

SMALL = 1e-3  # of the input's standard deviation: as small as float32 allows, for products of tokens are not linear


def inputs_of(args: tuple, kwargs: dict) -> list[Tensor]:
    """The different float tensors [B, N, C] that a module is called with."""
    found = [
        x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.is_floating_point() and x.ndim == 3
    ]
    return [x for n, x in enumerate(found) if all(x is not y for y in found[:n])]


@dataclass
class Links(Experiment):
    """Which input token each query and key of the layers in `modules` is of: noise grows by the two digits of its number."""

    axes: int = 2
    sizes: dict[nn.Module, list[int]] = field(default_factory=dict)  # of each module, the tokens of its inputs

    def enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """What the module gets instead of its inputs: those for the unchanged image, with noise."""
        inputs = [x for x in inputs_of(args, kwargs) if len(x) % self.batch == 0]
        self.sizes[module] = [x.shape[1] for x in inputs]
        noisy = [self._noisy(x, n) for n, x in enumerate(inputs)]

        def instead(x: object) -> object:
            return next((new for old, new in zip(inputs, noisy, strict=True) if old is x), x)

        return pytree.tree_map(instead, (args, kwargs))

    def _noisy(self, x: Tensor, number: int) -> Tensor:
        base = x.unflatten(0, (self.batch, -1))[:1]
        digits = _digits(x.shape[1], x.device)
        digits[0] += 2 * number  # a range of its own for each input
        noise = SMALL * (x.std().item() or 1.0) * torch.randn(DRAWS, *base.shape[1:], device=x.device, dtype=x.dtype)
        grown = [noise * (0.5 + digit.to(x.dtype)[:, None]) for digit in digits]
        changed = torch.stack([noise, *grown], 1).flatten(0, 1)  # as an Experiment orders its batch
        return (base + torch.cat([torch.zeros_like(base), changed])).flatten(0, 1)

    def tokens_of(self, response: Response, module: nn.Module) -> tuple[Tensor, Tensor] | None:
        """Of [G, N] queries or keys, which input and which of its tokens: -1 for none; None where one cannot be told."""
        places, answered = response.places, response.answered
        which = torch.where(answered, (places[..., 0] / 2).floor(), torch.tensor(-1.0)).long()
        token = torch.full_like(which, -1)
        for number, size in enumerate(self.sizes.get(module, [])):
            here = which == number
            base = math.isqrt(size - 1) + 1
            high, low = (places[..., 0] - 2 * number) * base - 0.5, places[..., 1] * base - 0.5
            clear = ((high - high.round()).abs() < 0.25) & ((low - low.round()).abs() < 0.25)
            index = high.round() * base + low.round()
            if not bool((clear & (index >= 0) & (index < size))[here].all()):
                return None
            token[here] = index[here].long()
        return (which, token) if bool((token >= 0)[answered].all()) else None


def _digits(size: int, device: torch.device) -> list[Tensor]:
    """The two digits of each of `size` numbers, each from 0 to 1: two coarse scales are told apart better than a fine one."""
    base = math.isqrt(size - 1) + 1
    number = torch.arange(size, device=device)
    return [(number // base + 0.5) / base, (number % base + 0.5) / base]


@dataclass
class Inputs(Experiment):
    """The experiment once more, in which the layers of `linked` answer with the input tokens that they are of."""

    linked: dict[str, tuple[nn.Module, tuple[Tensor, Tensor] | None, tuple[Tensor, Tensor] | None]] = field(
        default_factory=dict
    )
    answers: dict[nn.Module, list[Response]] = field(default_factory=dict)

    def enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Note what the input tokens of the module answer."""
        inputs = [x for x in inputs_of(args, kwargs) if len(x) % self.at_once == 0]
        whole = [
            self.whole(f"input {n} of {id(module)}", (x.unflatten(0, (self.at_once, -1)),))
            for n, x in enumerate(inputs)
        ]
        if all(x is not None for x in whole):
            self.answers[module] = [self.response(x) for x in whole if x is not None]

    def finish(self) -> dict[str, Seen | str]:
        """What was seen, with the answers of input tokens for those of the linked layers."""
        for name, (module, query, key) in self.linked.items():
            seen = self.seen.get(name)
            if isinstance(seen, Seen) and query is not None and key is not None and module in self.answers:
                seen.query = self._answer(seen.query, query, self.answers[module])
                seen.key = self._answer(seen.key, key, self.answers[module])
                seen.parts = ()
        return self.seen

    @staticmethod
    def _answer(own: Response, tokens: tuple[Tensor, Tensor], answers: list[Response]) -> Response:
        which, token = tokens
        new = Response(torch.zeros_like(own.strength), torch.zeros_like(own.moment), torch.ones_like(own.size))
        for number, answer in enumerate(answers):
            windows, here = len(answer.strength), which == number
            group, place = here.nonzero(as_tuple=True)
            window = group * windows // len(which)  # the heads of a window follow each other
            index = token[group, place]
            new.strength[group, place], new.size[group, place] = (
                answer.strength[window, index],
                answer.size[window, index],
            )
            new.moment[:, group, place] = answer.moment[:, window, index]
        return new
