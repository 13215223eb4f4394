"""What a network knows of an image, layer by layer: mean patch tokens after each block, and what its heads are fed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from cil import augment, data
from cil.checkpoint import RunDir
from cil.data import Dataset
from cil.evaluate import batch_size
from cil.models import Incremental
from cil.train import in_class_order
from locality_probe.record import evaluating
from locality_probe.subject import Subject


@torch.no_grad()
def features(model: Incremental, images: Tensor) -> dict[str, Tensor]:
    """{layer: [B, d] float32} of normalised images [B, 3, H, W], in one forward pass in eval mode.

    "block 0" ...: the mean patch token after each self-attention block, without prefix tokens; "token": what the newest
    head is fed; "tokens": where there is one token per task, all of them side by side, which is what herding compares.
    The model comes back as it was. Raises ValueError for a network without a list of blocks.
    """
    body: Any = getattr(model, "backbone", model)
    if not isinstance(getattr(body, "blocks", None), (nn.ModuleList, nn.Sequential)):
        raise ValueError(f"{type(body).__name__} has no list of blocks between which its tokens could be read")
    by_layer: dict[str, Tensor] = {}
    prefix, handles = getattr(body, "num_prefix_tokens", 0), []
    try:
        for index, block in enumerate(body.blocks):

            def keep(_block: nn.Module, _inputs: tuple, tokens: Tensor, name: str = f"block {index}") -> None:
                by_layer[name] = tokens[:, prefix:].mean(1).float()

            handles.append(block.register_forward_hook(keep))
        with evaluating(model):
            tokens = model.forward_features(images).float()  # [B, T, d]
    finally:
        for handle in handles:
            handle.remove()
    by_layer["token"] = tokens[:, -1]
    return by_layer | ({"tokens": tokens.flatten(1)} if tokens.shape[1] > 1 else {})


@dataclass(frozen=True)
class RunData:
    """The images that a run learns and is tested on; labels are positions in its class order, -1 for what it leaves out."""

    directory: RunDir
    dataset: Dataset

    def task_of(self, labels: Tensor) -> Tensor:
        """The task that brings each class: labels [n] -> [n]"""
        starts = torch.tensor([task.labels.start for task in self.directory.scenario])
        return torch.bucketize(labels, starts, right=True) - 1

    def draw(self, split: str, per_class: int | None, seed: int) -> tuple[Tensor, Tensor]:
        """(indices, labels) [n] of `per_class` images of each class of "train" or "test", or of all, drawn by `seed`."""
        labels = getattr(self.dataset, split).labels
        indices = (labels >= 0).nonzero().squeeze(1)
        if per_class is not None:
            order = indices[torch.randperm(len(indices), generator=torch.Generator().manual_seed(seed))]
            kept = [order[labels[order] == label][:per_class] for label in labels[indices].unique()]
            indices = torch.cat(kept).sort().values
        return indices, labels[indices]

    def batches(self, split: str, indices: Tensor, device: str = "cpu") -> Iterator[Tensor]:
        """Normalised [b, 3, H, W], as the run's networks take them."""
        for images in getattr(self.dataset, split).batches(indices.split(batch_size(device))):
            yield augment.normalize(images, self.directory.mean, self.directory.std)

    def features(
        self,
        subject: Subject,
        split: str,
        indices: Tensor,
        device: str = "cpu",
        report: Callable[[int], None] = lambda n: None,
    ) -> Iterator[dict[str, Tensor]]:
        """`features` of these images, a batch at a time, on the CPU."""
        model = subject.model.to(device)
        for batch in self.batches(split, indices, device):
            yield {name: x.cpu() for name, x in features(cast(Incremental, model), batch.to(device)).items()}
            report(len(batch))


def load(directory: RunDir, data_dir: str | None = None) -> RunData:
    """The data set that the run was trained on. Raises ValueError that says where it was looked for."""
    run = directory.run
    return RunData(
        directory, in_class_order(data.load(run.dataset, data_dir or run.data_dir, run.image_size), directory)
    )
