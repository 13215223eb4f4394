"""The experiment that shows where tokens are: attention is taken out of the way, and the image is changed a little.

While every attention gives each token its own value back, no token hears of another. The changes that noise in the image
makes in the keys, and the changes that the same noise makes once it grows along an axis of the image, from half to one and a
half of its size, tell which tokens are of the image, and where: with d0 and dx the changes, x = <dx, d0> / <d0, d0> - 1/2 in
parts of the image's side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from locality_probe.record.sighting import Run, Sighting

DRAWS = 2  # of noise in one pass
SILENT = 3e-6  # of a token's size: rounding in float32 changes it by less
WEAK = 1e-3  # of the strongest answer in the layer: what is weaker is rounding that an answer nearby made
NOISE = 2e-3  # of the image's standard deviation: small, so that the network is linear in it


@dataclass
class Response:
    """What each of [G, N] tokens answered, G being windows and heads of one image: strength <d0, d0>, and along each axis the
    moment <dx, d0>, [axes, G, N]; size: <x, x> of the tokens themselves, less channels that never change. All are summed
    over draws."""

    strength: Tensor
    moment: Tensor
    size: Tensor

    def __add__(self, other: Response) -> Response:
        return Response(self.strength + other.strength, self.moment + other.moment, self.size + other.size)

    def pooled(self, windows: int, heads: int, heads_first: bool) -> Response:
        """[G, N] -> [windows, N]: the answers of all heads together."""

        def pool(x: Tensor) -> Tensor:
            if heads_first:
                return x.unflatten(-2, (heads, windows)).sum(-3)
            return x.unflatten(-2, (windows, heads)).sum(-2)

        return Response(pool(self.strength), pool(self.moment), pool(self.size))

    @property
    def places(self) -> Tensor:
        """[G, N, axes] in parts of the image's sides, 0 to 1; NaN for tokens that do not answer at all."""
        return (self.moment / self.strength - 0.5).movedim(0, -1)

    @property
    def answered(self) -> Tensor:
        """Which tokens are of the image: bool [G, N]. The others' changes are rounding, or nothing."""
        return (self.strength > SILENT**2 * self.size) & (self.strength > WEAK**2 * self.strength.max())


def sum_of(responses: Sequence[Response]) -> Response:
    return sum(responses[1:], responses[0])


@dataclass
class Seen:
    """One attention in the experiment: its shape with so many images, and what its queries and keys answered."""

    shape: tuple[int, int, int, int]
    images: int
    query: Response
    key: Response
    copies: Tensor  # [G, K]: which key each key is an exact copy of, itself if of none before it
    parts: tuple[Response, ...] = ()  # of the keys: what key and value vectors answered by themselves

    @property
    def silent(self) -> bool:
        """Whether queries or keys as a whole answer nothing: attention of constants, of a text, or of class tokens alone."""
        return not (self.query.answered.any() and self.key.answered.any())


@dataclass
class Experiment:
    """The consumer that takes attention out of the way and notes the answers: seen, by name of layer.

    at_once: how many images go through the model together: all `batch`, or fewer, where the model takes no other number.
    """

    axes: int
    at_once: int = 0
    seen: dict[str, Seen | str] = field(default_factory=dict)
    parts: dict[str, list[tuple[Tensor, ...]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.at_once = self.at_once or self.batch

    @property
    def batch(self) -> int:
        """The image, and for each draw the noise and the noise that grows along each axis."""
        return 1 + DRAWS * (1 + self.axes)

    def __call__(self, name: str, sighting: Sighting, run: Run) -> object:
        if sighting.query is None or sighting.values is None:
            self.seen.setdefault(name, sighting.reason)
            out = run()
            return torch.zeros_like(out) if isinstance(out, Tensor) else out
        rows = sighting.shape[0] * sighting.shape[1]
        if rows % self.at_once:
            self.seen[name] = f"its {sighting.shape[0]} x {sighting.shape[1]} maps are not of one image each"
            return run()
        if sighting.reason:  # no attention to be measured, but it mixes tokens all the same
            self.seen[name] = sighting.reason
            return sighting.output(self.own_values(sighting.values, None, None, sighting.shape[2]))
        tokens = tuple(x.flatten(0, 1).unflatten(0, (self.at_once, -1)) for x in (sighting.query, *sighting.keys))
        whole = self.whole(name, tokens)
        if whole is not None:
            query, *parts = (self.response((x,)) for x in whole)
            key = sum_of(parts)
            shape = (sighting.shape[0] // self.at_once * self.batch, *sighting.shape[1:])
            self.seen[name] = Seen(
                shape, self.batch, query, key, copies_of(torch.cat([x[0] for x in whole[1:]], -1)), tuple(parts)
            )
            return sighting.output(self.own_values(sighting.values, query, key))
        return sighting.output(self.own_values(sighting.values, None, None, sighting.shape[2]))

    def whole(self, name: str, tokens: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Tokens [batch, ...] once those of all images are there, a few images at a time."""
        if self.at_once == self.batch:
            return tokens
        parts = self.parts.setdefault(name, [])
        parts.append(tokens)
        if sum(len(part[0]) for part in parts) < self.batch:
            return None
        return tuple(torch.cat(some)[: self.batch] for some in zip(*parts, strict=True))

    def response(self, tokens: tuple[Tensor, ...]) -> Response:
        """tokens: each [batch, G, N, d], the image and its changed copies in turn -> their answers, summed over d."""
        answers = []
        for x in tokens:
            x = x.cpu().double() if x.device.type == "mps" else x.double()  # which has no float64
            change = (x[1:] - x[:1]).unflatten(0, (DRAWS, 1 + self.axes))
            first, rest = change[:, :1], change[:, 1:]
            strength, moment = first.square().sum(-1).sum((0, 1)), (rest * first).sum(-1).sum(0)
            # Channels that change in no token are constants, as positional columns beside q.k: however large, they say nothing.
            alive = (change != 0).flatten(0, 1).any(0).any(1, keepdim=True)  # [G, 1, d]
            size = DRAWS * (x[0].square() * alive).sum(-1)
            answers.append(Response(strength.cpu(), moment.cpu(), size.cpu()))
        return sum_of(answers)

    def own_values(self, values: Tensor, query: Response | None, key: Response | None, queries: int = 0) -> Tensor:
        """[B0, H0, K, d] -> [B0, H0, Q, d]: each query gets the value of its own token, or else of the key nearest to it;
        nothing, where it is not yet known where they are."""
        if query is None or key is None:
            return (
                values if queries == values.shape[2] else values.new_zeros(*values.shape[:2], queries, values.shape[3])
            )
        if query.strength.shape[1] == key.strength.shape[1]:
            return values
        there = query.answered
        q = query.places.masked_fill(~there[..., None], 9.0)
        k = key.places.masked_fill(~key.answered[..., None], -9.0)
        nearest = torch.stack([torch.cdist(a, b).argmin(1) for a, b in zip(q, k, strict=True)])  # [G, Q]
        flat = values.flatten(0, 1).unflatten(0, (self.at_once, -1))
        index = nearest.to(values.device)[None, :, :, None].expand(self.at_once, -1, -1, values.shape[-1])
        taken = flat.gather(2, index) * there.to(values.device)[None, :, :, None]
        return taken.flatten(0, 1).unflatten(0, values.shape[:2])


def copies_of(keys: Tensor) -> Tensor:
    """[G, K, d] -> [G, K]: the first key that is the same to the last bit."""
    found = []
    for group in keys:
        _, inverse = group.unique(dim=0, return_inverse=True)
        first = torch.full((len(group),), len(group))
        first.scatter_reduce_(0, inverse.cpu(), torch.arange(len(group)), "amin")
        found.append(first[inverse.cpu()])
    return torch.stack(found)


def along(image: Tensor, axis: int) -> Tensor:
    """Where the pixels of an input [C, ...] are along one of its dimensions, 0 to 1, in a shape that fits the input."""
    side = image.shape[axis]
    ramp = ((torch.arange(side, device=image.device) + 0.5) / side).to(image.dtype)
    return ramp.view([side if n == axis else 1 for n in range(image.ndim)])


def changed(image: Tensor, parts: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """One input [C, ...] -> [batch, C, ...]: itself, and for each draw of noise itself with the noise, and with the noise
    that grows along each axis. parts: for each axis where what the input holds is, 0 to 1; NaN: padding, left as it is."""
    size = NOISE * (image.float().std().item() or 1.0)
    found = [image]
    for _ in range(DRAWS):
        noise = size * torch.randn(image.shape, generator=generator).to(image.device, image.dtype)
        noise = torch.where(torch.stack([part.isnan().expand(image.shape) for part in parts]).any(0), 0.0, noise)
        found.append(image + noise)
        found += [image + noise * (0.5 + part.nan_to_num()) for part in parts]
    return torch.stack(found)
