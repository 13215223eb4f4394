"""What every command prints for people fits 80 columns on a pipe, and help texts do; messages on stderr are sentences."""

import pytest
from conftest import TOY, invoke, settings

from locality_probe.cli import main

FEW = settings(
    {"epochs_first": 1, "epochs": 1, "finetune_epochs": 1, "num_classes": 4, "images_per_class": 6, "depth": 2}
)
COMMANDS = {
    "measure": ["measure", "runs/toy", "--n", "4", "--out", "out"],
    "measure a model": ["measure", "--model", "timm/test_vit", "--images", "photos", "--out", "out"],
    "compare": ["compare", "runs/toy", "runs/toy-joint", "--n", "4"],
    "compare tasks": ["compare", "runs/toy/task_00.safetensors", "runs/toy/task_01.safetensors", "--n", "4"],
    "heatmap": ["heatmap", "picture.png", "--ckpt", "runs/toy", "-o", "map.png"],
    "spectrum": ["spectrum", "runs/toy", "--n", "8", "--out", "spectra"],
    "transfer": ["transfer", "runs/toy", "--per-class", "4", "--test-per-class", "4", "--out", "transfer"],
    "doctor": ["doctor", "runs/toy"],
    "doctor, skipped layers": ["doctor", "timm/xcit_nano_12_p16_224"],
    "recipes": ["recipes"],
    "train --dry-run": ["train", "demo-baseline", "--dry-run", *FEW],
    "sweep --status": ["sweep", "demo-baseline", "--status", "--out", "sweep"],
    "reproduce --dry-run": ["reproduce", "--scale", "paper", "--dry-run", "--only", "fig2"],
    "a wrong name": ["measure", "--model", "timm/vit_tini_patch16_224"],
    "a missing run": ["measure", "nowhere"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_what_a_command_prints_fits(name, toy_runs, picture, tmp_path, monkeypatch):
    assert TOY.depth == 3  # the runs that are measured
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to(toy_runs)
    (tmp_path / "picture.png").write_bytes(picture.read_bytes())
    result = invoke(*COMMANDS[name])
    assert result.exit_code in (0, 1, 2) and result.output.strip(), result.output
    assert not result.exception or isinstance(result.exception, SystemExit), result.exception
    wide = [line for line in result.stdout.splitlines() if len(line) > 80 and " " in line.strip()]
    assert not wide, wide


@pytest.mark.parametrize("name", ["", *main.commands])
def test_help_fits(name):
    lines = invoke(*name.split(), "--help").output.splitlines()
    assert lines and all(len(line) <= 80 for line in lines), max(lines, key=len)
