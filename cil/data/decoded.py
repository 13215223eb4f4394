"""FileSet: images that are decoded when they are asked for, and the worker processes that decode them."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cil.data.images import centre_crop, open_image, random_crop, to_tensor
from cil.device import cores

PIECE = 16  # images that a worker decodes in one go: all workers share the first batch, and stopping is quick


@dataclass(frozen=True)
class FileSet:
    """Images that are decoded when asked for. labels: int64 [n], original class numbers; image_size: (H, W) as seen.

    workers: processes that decode; None: one for each core that this process may use, none for a few images.
    """

    files: list[Path]
    labels: Tensor
    image_size: tuple[int, int]
    workers: int | None = None

    def __len__(self) -> int:
        return len(self.files)

    def batches(self, indices: Sequence[Tensor], seeds: Sequence[Tensor] | None = None) -> Iterator[Tensor]:
        """uint8 [b, 3, H, W] for each index tensor [b], in order, decoded by workers about two batches ahead.

        seeds: int64 [b] each, of which torch uses the low 32 bits. With them images are cut by `random_crop`, each by its
        own seed alone, so that the pixels depend neither on workers nor on batches; without them by `centre_crop`.
        Closing the iterator ends the workers. Raises ValueError naming a file that is no image, PermissionError, and
        ChildProcessError when a worker is killed.
        """
        crops = [None] * len(indices) if seeds is None else seeds
        batches = [_pieces(*batch) for batch in zip(indices, crops, strict=True)]
        decoded = _decoded(self, [piece for batch in batches for piece in batch], max(map(len, batches), default=0))
        for batch in batches:
            yield torch.cat(list(itertools.islice(decoded, len(batch))))

    def to(self, device: str) -> FileSet:
        """This set: what is decoded is sent to a device batch by batch."""
        return self

    arrivals = batches  # what of each batch a training step sends to the device: its pixels

    def pixels(self, arrived: Tensor) -> Tensor:
        """uint8 [b, 3, H, W] of what `arrivals` gave."""
        return arrived

    def decode(self, places: list[int], seeds: list[int] | None) -> Tensor:
        """Here and now: uint8 [k, 3, H, W] of the images at `places`, as `batches` cuts them."""
        pixels = torch.empty(len(places), 3, *self.image_size, dtype=torch.uint8)
        for n, place in enumerate(places):
            image, size = open_image(self.files[place]), self.image_size
            pixels[n] = to_tensor(centre_crop(image, size) if seeds is None else random_crop(image, size, seeds[n]))
        return pixels

    def with_labels(self, labels: Tensor) -> FileSet:
        """The same files under other labels [n]."""
        return dataclasses.replace(self, labels=labels)

    def pictures(self) -> list[Path]:
        """Every image's file."""
        return self.files


_Piece = tuple[list[int], list[int] | None]  # places [k] in a FileSet, and their seeds or None


def _pieces(places: Tensor, seeds: Tensor | None) -> list[_Piece]:
    """A batch [b] in pieces of PIECE; one empty piece for an empty batch. Raises ValueError unless there are b seeds."""
    if seeds is None:
        return [(part.tolist(), None) for part in places.split(PIECE)]
    if seeds.shape != places.shape:
        raise ValueError(f"{len(places)} images need that many seeds, got {tuple(seeds.shape)}")
    return [(p.tolist(), s.tolist()) for p, s in zip(places.split(PIECE), seeds.split(PIECE), strict=True)]


class _Decoder(Dataset):
    """What a DataLoader asks for a piece. An error comes back as a value: raised, it would be wrapped in a traceback."""

    def __init__(self, files: FileSet):
        self.files = files

    def __getitem__(self, piece: _Piece) -> Tensor | Exception:
        try:
            return self.files.decode(*piece)
        except (ValueError, OSError) as error:
            return error


def _decoded(files: FileSet, pieces: list[_Piece], a_batch: int) -> Iterator[Tensor]:
    """Each piece's images uint8 [k, 3, H, W], in order; about two batches of `a_batch` pieces are decoded ahead."""
    workers = files.workers
    if workers is None:
        workers = min(_cores(), len(pieces)) if len(pieces) >= 4 else 0  # to start them takes as long as a piece or two
    options: dict[str, Any] = {}
    if workers:
        options["prefetch_factor"] = max(2, -(-2 * a_batch // workers))
        if sys.platform == "linux":  # Python's newer ways to start a process import torch anew in each, every epoch
            options["multiprocessing_context"] = "fork"
    # With a generator of its own a DataLoader leaves torch's alone.
    loader: DataLoader = DataLoader(
        _Decoder(files), sampler=pieces, batch_size=None, num_workers=workers, generator=torch.Generator(), **options
    )
    arriving = None
    try:
        # Ctrl-C waits, and the workers, who inherit that, never see one: what it means is for this process to say.
        with _held(signal.SIGINT):
            arriving = iter(loader)
        while (piece := _next(arriving)) is not None:
            if isinstance(piece, Exception):
                raise piece
            yield piece
    finally:
        # What torch does when it drops the iterator, but now: a traceback may hold that for long. When a worker was
        # killed, torch raises that again as each of the others ends, and would leave some behind.
        with _held(signal.SIGCHLD):
            getattr(arriving, "_shutdown_workers", lambda: None)()


def _next(arriving: Iterator[Tensor | Exception]) -> Tensor | Exception | None:
    """The next piece, or None after the last. Raises ChildProcessError when the workers do not bring it."""
    try:
        return next(arriving, None)
    except (RuntimeError, EOFError, OSError) as error:  # according to what the worker was at when it was killed
        reason = [type(error).__name__, *str(error).strip().splitlines()][-1]
        raise ChildProcessError(f"decoding images failed ({reason}); is memory or /dev/shm full?") from None


@contextlib.contextmanager
def _held(what: signal.Signals) -> Iterator[None]:
    """A signal that comes during the body is dealt with after it; processes that the body starts never get it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, {what})
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _cores() -> int:
    """How many cores decode; torchrun's processes on one machine share those that there are."""
    return max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
