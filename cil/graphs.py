"""Replay: work of fixed shapes on a GPU as a CUDA graph, one launch in place of thousands."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from cil.device import layout, pack, unpack

WARM_UP = 3  # times that the work is done before it is captured: libraries choose and allocate then
MOST = 8  # graphs that are kept; work of further layouts is done as it comes


class Replay:
    """A piece of work on CUDA, by one copy and one launch: called with `work` and its `parts`, for work(*parts).

    parts: tuples and lists of CPU tensors and other things. The work is the same in every call. It reads its parts, adds to
    `sums`, which stays where it is, and leaves gradients of `parameters` behind. It is captured when a layout of parts
    (cil.device.layout) is seen for the first time. The same kernels run as without a graph, and give the same numbers. Work
    that cannot be captured, because it waits for the GPU, say, is done as it comes, with a warning.
    """

    def __init__(self, parameters: Iterable[Tensor], sums: Tensor):
        self.parameters, self.sums, self.device = list(parameters), sums, sums.device
        self.captured: dict[Any, tuple[torch.cuda.CUDAGraph, Tensor, list[Tensor | None]]] = {}
        self.possible = True

    def __call__(self, work: Callable[..., None], parts: Any) -> None:
        packet, key = pack(parts), layout(parts)
        if self.possible and key not in self.captured and len(self.captured) < MOST:
            try:
                self.captured[key] = self.capture(work, parts, packet)
            except RuntimeError as error:
                self.possible = False
                reason = str(error).splitlines()[0]
                warnings.warn(f"steps of this network are not captured as CUDA graphs: {reason}", stacklevel=2)
                torch.cuda.synchronize(self.device)
        if key not in self.captured:
            self.plainly(work, parts, packet.to(self.device, non_blocking=True))
            return
        graph, there, gradients = self.captured[key]
        there.copy_(packet, non_blocking=True)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        graph.replay()

    def plainly(self, work: Callable[..., None], parts: Any, packet: Tensor) -> None:
        """The work on parts that are in a packet on the device, with gradients that were not there before."""
        for parameter in self.parameters:
            parameter.grad = None
        work(*unpack(parts, packet))

    def capture(
        self, work: Callable[..., None], parts: Any, packet: Tensor
    ) -> tuple[torch.cuda.CUDAGraph, Tensor, list[Tensor | None]]:
        """A graph of the work, the packet that it reads, and the gradients that it writes, in the order of `parameters`."""
        there, before = packet.to(self.device), self.sums.clone()
        aside = torch.cuda.Stream(self.device)
        aside.wait_stream(torch.cuda.current_stream(self.device))
        try:
            with torch.cuda.stream(aside):
                for _ in range(WARM_UP):
                    self.plainly(work, parts, there)
            torch.cuda.current_stream(self.device).wait_stream(aside)
        finally:
            self.sums.copy_(before)
        for parameter in self.parameters:
            parameter.grad = None
        graph = torch.cuda.CUDAGraph()
        pool = next((graph.pool() for graph, *_ in self.captured.values()), None)
        with torch.cuda.graph(graph, pool=pool, stream=aside, capture_error_mode="thread_local"):
            work(*unpack(parts, there))
        return graph, there, [parameter.grad for parameter in self.parameters]
