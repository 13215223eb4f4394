"""LocalityLog: how far each layer looks while a model trains, for any training loop."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from torch import Tensor, nn

from locality_probe.probe import Probe
from locality_probe.tables import HISTORY


class LocalityLog:
    """D_loc of each layer while a model trains, for any loop: `log(model, epoch)` after each epoch.

        log = LocalityLog("locality.csv", images)          # a fixed batch [B, 3, H, W], as the model takes it; on any device
        for epoch in range(epochs):
            train(...)
            log(model, epoch)

    Each call rewrites the CSV (columns: locality_probe.tables.HISTORY). A log made for a file that exists continues it, and
    epochs that are trained again replace their rows. tensorboard: a folder to which the same is written as scalars. Raises
    ValueError where the package tensorboard is missing.
    """

    def __init__(
        self, path: str | Path, images: Tensor, grid: tuple[int, ...] | None = None,
        num_prefix_tokens: int | None = None, tensorboard: str | Path | None = None, batch_size: int = 32,
    ):  # fmt: skip
        self.path, self.images, self.batch_size = Path(path), images, batch_size
        self.grid, self.num_prefix_tokens, self.writer = grid, num_prefix_tokens, None
        self.history = HISTORY.read(path) if self.path.exists() else None
        if tensorboard is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ValueError(f"tensorboard={tensorboard!r} needs the package tensorboard: install it") from None
            self.writer = SummaryWriter(str(tensorboard))

    def __call__(self, model: nn.Module, epoch: int) -> pd.DataFrame:
        """Measure, write, and return the rows of this epoch."""
        device = next((p.device for p in model.parameters()), self.images.device)
        with Probe(model, self.grid, self.num_prefix_tokens, ("d_loc", "prefix_mass")) as probe:
            for batch in self.images.split(self.batch_size):
                probe.update(batch.to(device))
        measurement = probe.result()
        heads = measurement.table().groupby("layer", as_index=False)
        rows = heads[["d_loc", "d_uniform", "d_ratio", "prefix_mass"]].mean()
        rows["name"] = [measurement.layers[index].name for index in rows["layer"]]
        rows["epoch"] = epoch
        earlier = [] if self.history is None else [self.history[self.history["epoch"] < epoch]]
        self.history = pd.concat([*earlier, rows], ignore_index=True)
        HISTORY.write(self.history, self.path)
        if self.writer is not None:
            for row in rows.itertuples():
                self.writer.add_scalar(f"d_loc/layer_{row.layer:02d}", row.d_loc, epoch)
            self.writer.flush()
        return HISTORY.check(rows)
