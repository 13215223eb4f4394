"""The command line's: what can be measured of a model."""

from __future__ import annotations

import click

from locality_probe.commands import options
from locality_probe.commands.base import command, say, warn
from locality_probe.typed import Typed, check_model


@command("doctor")
@click.argument("model", required=False)
@options.grid
@options.prefix
@options.weights
@options.pretrained
@options.image_size
@options.as_json("the layers")
@click.option(
    "--families", is_flag=True, help="Instead, the table of docs/support.md: a member of each family; 2 minutes."
)
@options.threads
@options.device()
def doctor_command(model, grid, prefix, weights, pretrained, image_size, as_json, families, threads, device) -> None:
    """What can be measured of MODEL: each attention layer, its grid and tokens, how it is seen, or why it is skipped.

    MODEL: a run directory, a weights file, timm/NAME, torchvision/NAME, hf/FOLDER or open_clip/NAME. Exit code 1 where no
    layer can be.
    """
    if bool(model) == families:
        raise Typed("give a MODEL, like runs/demo/demo-baseline or timm/vit_tiny_patch16_224, or --families")
    if families and device not in ("auto", "cpu"):
        raise Typed("--families looks at its models on the CPU: leave --device away")
    if model:
        check_model(model)
    import json

    from cil.progress import counter
    from locality_probe import doctor
    from locality_probe import families as matrix

    device = options.compute_on(device, threads)
    if families:
        with counter(matrix.FAMILIES, "families") as report:
            click.echo(matrix.support_matrix(report), nl=False)
        return
    subject = doctor.find(model, weights, pretrained, warn if weights else lambda sentence: None, image_size)
    layers = doctor.examine_subject(subject, grid, prefix, device)
    if as_json:
        click.echo(json.dumps([layer.as_dict() for layer in layers], indent=1))
    else:
        say(f"{subject.run}\n{doctor.format_layers(layers)}")
    if all(layer.status != "ok" for layer in layers):
        raise SystemExit(1)
