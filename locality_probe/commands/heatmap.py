"""The command line's: attention over one image."""

from __future__ import annotations

from pathlib import Path

import click

from locality_probe.commands import options
from locality_probe.commands.base import command, say, warn
from locality_probe.typed import Typed, parse_heads, parse_layers, parse_query, split_checkpoint, typed


def newest_run(root: Path = Path("runs")) -> Path | None:
    """The run directory under `root` whose last task is the newest, or None."""
    weights = [w for run in root.glob("**/run.json") for w in run.parent.glob("task_*.safetensors")]
    return max(weights, key=lambda path: path.stat().st_mtime).parent if weights else None


@command("heatmap")
@click.argument("image", type=click.Path(path_type=Path))
@click.option("--ckpt", "ckpts", multiple=True, metavar="RUN_DIR[:TASK]", help="TASK: a number, init or all; repeatable.  "
              "[default: the newest run under runs/]")  # fmt: skip
@options.model
@options.weights
@options.pretrained
@options.image_size
@click.option("--layer", default="all", show_default=True, help="Numbers from 0, like 0,2, or all.")
@click.option("--head", default="mean", show_default=True, help="Numbers from 0, mean or all.")
@click.option("--query", default="mean", show_default=True, help="mean, cls, a patch as ROW,COLUMN from 0, or the patch "
              "under a pixel of IMAGE as pixel:ROW,COLUMN.")  # fmt: skip
@click.option("--rollout", is_flag=True, help="Attention as it adds up over the layers (heads averaged).")
@click.option("--difference", is_flag=True, help="Of two checkpoints: the second minus the first.")
@click.option("--columns", type=click.Choice(["run", "task", "layer", "head"]), help="What columns are; rows are the rest.  "
              "[default: the first of task, run, head, layer that varies]")  # fmt: skip
@click.option("--scale", type=click.Choice(["shared", "each", "uniform"]), default="shared", show_default=True,
              help="Colour range: of all panels, of each, or the ratio to uniform attention.")  # fmt: skip
@click.option("-o", "--out", type=options.Filled(Path), help=".png, .svg or .pdf.  [default: IMAGE_heatmap.png here]")
@options.threads
@options.device()
def heatmap_command(
    image, ckpts, model, weights, pretrained, image_size, layer, head, query, rollout, difference, columns, scale, out,
    threads, device
) -> None:  # fmt: skip
    """Attention over IMAGE from a query; several checkpoints side by side. The raw array lies beside the picture."""
    if ckpts and model:
        raise Typed("give --ckpt or --model, not both")
    if (weights or pretrained or image_size) and not model:
        raise Typed("--weights, --pretrained and --image-size go with --model")
    if difference and scale != "shared":
        raise Typed(f"--scale {scale} does not go with --difference, whose scale is around 0")
    parse_layers(layer), parse_heads(head), parse_query(query)
    if not image.exists():
        raise ValueError(f"no image {image}")
    out = out or Path(f"{image.stem}_heatmap.png")
    options.check_folder(out.parent)
    for written in (out, out.with_suffix(".npz")):
        if written.exists() and written.samefile(image):
            raise Typed(f"--out {out} would overwrite {image}: choose another name")
    if not (ckpts or model):
        ckpts = [str(newest) for newest in [newest_run()] if newest]
    if not (ckpts or model):
        raise Typed("no model: give --ckpt RUN_DIR or --model timm/NAME, or make a run with `locality-probe demo`")
    for spec in ckpts:
        split_checkpoint(spec)
    from cil.data import open_image
    from figures import attention_maps, style
    from locality_probe import heatmap
    from locality_probe.subject import from_model_option

    typed(style.check_suffix, out)
    raw = out.with_suffix(".npz")
    if raw.exists() and not heatmap.is_raw(raw):
        raise ValueError(
            f"{raw} is there, holds no heat map, and would be the raw array beside {out}: choose another --out"
        )
    device = options.compute_on(device, threads)
    opened = open_image(image)
    if model:
        subjects = [from_model_option(model, weights, pretrained, warn, image_size)]
    else:
        subjects = [make() for spec in ckpts for make in heatmap.parse_checkpoint(spec)]
    found = heatmap.heat_maps(subjects, opened, layer, head, query, rollout, difference, columns, device)
    scale = "difference" if difference else scale
    style.save(attention_maps.draw(**found.drawing(), scale=scale), out)
    raw = found.save(out.with_suffix(".npz"), scale)
    for sentence in found.left_out:
        say(sentence)
    say(f"wrote {out} and {raw}")
