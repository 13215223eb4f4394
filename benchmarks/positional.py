"""What D_loc of GPSA and LPA is made of, from weights alone, beside the steps that a network has taken.

    python benchmarks/positional.py RUN_DIR ... > docs/small/positional.csv

In GPSA content and position add up: D_loc = (1 - s) D_content + s D_position, with the gate s. D_position is that of the
softmax of the positional scores alone; no image enters it. A row a run, task (-1: as initialised) and layer, means over
heads: `steps` that the network took since it was initialised (a joint twin starts afresh at each task), `gate` (GPSA), `lambda`
(LPA), `strength`, which is minus the positional weight of the squared distance, and `d_position` in patches.
"""

import sys

import numpy as np
import pandas as pd
import torch

from cil import checkpoint
from cil.attention import positional_bias
from locality_probe.measures import distances
from locality_probe.subject import from_run


def rows_of(path: str) -> pd.DataFrame:
    directory, found = checkpoint.open_run(path), []
    steps = directory.table("training").groupby("task")["steps"].sum()
    steps = (steps if directory.run.training == "joint" else steps.cumsum()).to_dict() | {-1: 0}
    for task in (-1, *directory.tasks):
        local = [m for m in from_run(directory, task).model.modules() if hasattr(m, "pos_weight")]
        for layer, module in enumerate(local):
            weight, grid = module.pos_weight.detach(), module.grid
            positional = positional_bias(weight, grid).softmax(-1)
            gate, scale = (getattr(module, name, None) for name in ("gate", "content_scale"))
            found.append({
                "run": directory.name, "task": task, "layer": layer, "steps": steps[task],
                "gate": np.nan if gate is None else gate.sigmoid().mean().item(),
                "lambda": np.nan if scale is None else scale.mean().item(),
                "strength": -weight[:, 2].mean().item(),
                "d_position": (positional * distances(grid).to(weight)).sum(-1).mean().item(),
            })  # fmt: skip
    return pd.DataFrame(found)


if __name__ == "__main__":
    with torch.no_grad():
        table = pd.concat([rows_of(path) for path in sys.argv[1:]])
    table.to_csv(sys.stdout, index=False, float_format="%.6g")
