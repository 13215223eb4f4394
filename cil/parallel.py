"""One run on several processes, as torchrun starts them: the same batches, draws, memory and schedule for any number.

Each process computes some rows of a global batch. Random numbers are drawn for all rows and each process takes its own;
logits are gathered, so that the loss is that of the global batch; gradients are summed as they come. Process 0 alone writes
files.
Outside torchrun there is one process, and everything here hands back what it was given.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

_batch: tuple[int, Tensor] | None = None  # (rows of the global batch, this process's among them), inside `batch`

Result = TypeVar("Result")
LOST = ("gloo", "nccl", "connection", "peer", "timed out")  # in what torch says where a process has gone


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def processes(device: str) -> Iterator[str]:
    """Join the processes that torchrun started (nccl on CUDA, else gloo); yields the device of this one.

    Raises ValueError where WORLD_SIZE, which torchrun sets, is no number of processes, and ChildProcessError where another
    process is gone.
    """
    world = os.environ.get("WORLD_SIZE", "1")
    if not (world.isdecimal() and 0 < int(world[:9]) and len(world) < 9):
        raise ValueError(
            f"WORLD_SIZE={world[:40]!r} is no number of processes: start several with torchrun, or unset it"
        )
    if int(world) == 1:
        yield device
        return
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    dist.barrier()  # one that fails and leaves before all have met would be a broken connection to the others
    try:
        yield device
    except RuntimeError as error:
        if not any(word in str(error).lower() for word in LOST):
            raise
        raise ChildProcessError(
            f"process {rank()} lost another one, which failed or was killed; the same command goes on from the last saved state"
        ) from None
    finally:
        dist.destroy_process_group()


def rows(n: int, process: int | None = None) -> Tensor:
    """Which of n rows a process computes, by default this one; i and n - 1 - i stay together, for mixup blends them.

    Raises ValueError when there are too few for every process to have a pair.
    """
    if size() == 1:
        return torch.arange(n)
    if n < 2 * size():
        raise ValueError(f"a batch of {n} images is too small for {size()} processes")
    pairs = torch.arange((n + 1) // 2).tensor_split(size())[rank() if process is None else process]
    return torch.cat([pairs, n - 1 - pairs]).unique()


@contextlib.contextmanager
def batch(n: int) -> Iterator[None]:
    """The body works on this process's rows of a global batch of n: what `whole`, `own` and `gather` go by."""
    global _batch
    _batch = (n, rows(n))
    try:
        yield
    finally:
        _batch = None


def whole(n: int) -> int:
    """For how many rows to draw random numbers where this process holds n."""
    return n if _batch is None or size() == 1 else _batch[0]


def own(drawn: Tensor, dim: int = 0) -> Tensor:
    """This process's rows of what was drawn for the whole batch."""
    return drawn if _batch is None or size() == 1 else drawn.index_select(dim, _batch[1].to(drawn.device))


def gather(mine: Tensor) -> Tensor:
    """Rows [b, ...] of each process -> all rows of the batch, in order; gradients flow into this process's own."""
    if _batch is None or size() == 1:
        return mine
    n, _ = _batch
    everyone = _rows_of_all(n, size(), mine.device)
    padded = mine.new_zeros(max(map(len, everyone)), *mine.shape[1:])
    padded[: len(mine)] = mine.detach()
    parts = [torch.empty_like(padded) for _ in everyone]
    dist.all_gather(parts, padded)
    full = mine.new_empty(n, *mine.shape[1:])
    for theirs, part in zip(everyone, parts, strict=True):
        full[theirs] = part[: len(theirs)]
    return full.index_copy(0, everyone[rank()], mine)


@functools.lru_cache(maxsize=16)
def _rows_of_all(n: int, processes: int, device: torch.device) -> list[Tensor]:
    """`rows` of every process, on a device: sent once, for each sending would be waited for."""
    return [rows(n, process).to(device) for process in range(processes)]


def summing(module: nn.Module) -> nn.Module:
    """The module, whose backward pass then sums gradients over processes while it goes on (DistributedDataParallel).

    Each process's gradients come from its own rows of one global loss: their sum, not their mean, is its gradient.
    """
    if size() == 1:
        return module
    # The same parts of the network take part in every step: those that never do are found in the first.
    with warnings.catch_warnings():
        # Newer versions of torch call it forward_sync_buffers.
        warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
        wrapped = DistributedDataParallel(
            module, broadcast_buffers=False, gradient_as_bucket_view=True, static_graph=True
        )
    wrapped.register_comm_hook(None, _sum_of_bucket)
    return wrapped


def _sum_of_bucket(state, bucket):  # torch looks at the annotations, and does not understand them as strings
    future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return future.then(lambda done: done.value()[0])


def share(batches: Sequence) -> Sequence:
    """This process's part of whole batches: rounding inside one does not depend on the number of processes."""
    return batches[rank() :: size()]


def join(results: list, n: int) -> list:
    """What every process made of its share, in the order of the n batches."""
    if size() == 1:
        return results
    everyone: list[list] = [[] for _ in range(size())]
    dist.all_gather_object(everyone, results)
    return [everyone[i % size()][i // size()] for i in range(n)]


def anywhere(flag: bool) -> bool:
    """Whether `flag` holds in any process."""
    if size() == 1:
        return flag
    flags = torch.tensor(float(flag), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(flags)
    return bool(flags)


def once(function: Callable[..., Result], *args: object) -> Result:
    """function(*args) in process 0, while the others wait; they get what it returned.

    Raises what the function raises, and in the others ChildProcessError with its words.
    """
    if size() == 1:
        return function(*args)
    result, failure = None, None
    if rank() == 0:
        try:
            result = function(*args)
        except BaseException as error:
            failure = error
    told: list = [result, str(failure) if failure else None]
    dist.broadcast_object_list(told)
    if failure:
        raise failure
    if told[1] is not None:
        raise ChildProcessError(f"process 0 failed: {told[1]}")
    return told[0]
