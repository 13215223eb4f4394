"""Networks under the trainer: freezing by name with many tasks, and timm backbones trained by the same loop."""

import dataclasses
import time

import pytest
import torch

from cil import checkpoint, dry_run
from cil.fit import frozen_parts, is_part
from cil.models import DropPath, create_model
from cil.run import Run
from cil.schedule import finetune_phase, main_phase, plan
from cil.train import in_class_order, load_dataset, train
from locality_probe.plan import make_plan
from locality_probe.survey import survey

TINY = {"model": "timm/vit_tiny_patch16_224", "patch_size": 4, "drop_path": 0.2}


def test_task_ten_does_not_freeze_with_task_one(toy_run):
    """tokens.1 and heads.1 are old at task 10; tokens.10 and heads.10 are new."""
    directory = dataclasses.replace(toy_run, run=Run(method="dytox", scenario="B2-2"))
    frozen = frozen_parts(directory, main_phase(directory, 10, torch.arange(1)[None]))
    assert all(frozen(f"tokens.{t}") and frozen(f"heads.{t}.fc.weight") for t in range(10))
    assert not frozen("tokens.10") and not frozen("heads.10.fc.weight") and not frozen("blocks.1.attn.v.weight")
    fine = frozen_parts(directory, finetune_phase(directory, 10, torch.arange(1)[None]))
    assert not fine("tokens.10") and not fine("task_block.attn.q.weight") and fine("blocks.0.attn.v.weight")
    assert is_part("heads.1.fc", ["heads"]) and not is_part("heads_1", ["heads"])


def test_drop_path_drops_rows_and_keeps_the_mean():
    torch.manual_seed(0)
    drop, x = DropPath(0.25), torch.ones(4000, 3, 2)
    y = drop(x)
    assert y.unique().tolist() == pytest.approx([0, 4 / 3]) and (y == y[:, :1, :1]).all()
    assert y.mean() == pytest.approx(1, abs=0.03)
    assert torch.equal(drop.eval()(x), x)


@pytest.fixture(scope="module")
def timm_run(toy, tmp_path_factory):
    """Three tasks with a class token, and measured by the instrument."""
    run = dataclasses.replace(toy, **TINY, n_lpa=0, epochs=1, epochs_first=1, finetune_epochs=1, images_per_class=6)
    return train(run, tmp_path_factory.mktemp("timm") / "run")


def test_timm_backbone_trains_by_the_same_loop(timm_run):
    assert timm_run.tasks == [0, 1, 2]
    first, last = timm_run.model(0), timm_run.model(2)
    assert [head.fc.out_features for head in last.heads] == [2, 2, 2]
    assert not torch.equal(first.backbone.blocks[0].attn.qkv.weight, last.backbone.blocks[0].attn.qkv.weight)
    assert any(isinstance(module, DropPath) for module in last.backbone.modules())
    x = torch.randn(2, 3, 8, 8)
    assert torch.allclose(last.forward_features(x)[:, 0], last.backbone.forward_features(x)[:, 0], atol=1e-5)


def test_timm_backbone_fine_tunes_its_class_token_and_heads(timm_run):
    names = [name for name, _ in timm_run.grown_model(1).named_parameters()]
    frozen = frozen_parts(timm_run, finetune_phase(timm_run, 1, torch.arange(1)[None]))
    assert {n for n in names if not frozen(n)} == {"backbone.cls_token", *(n for n in names if n.startswith("heads"))}


def test_timm_backbone_is_measured(timm_run):
    plan = make_plan([str(timm_run.path)], n=4)
    table = survey((make() for make in plan.subjects), plan.images).nonlocality
    assert set(table["task"]) == {-1, 0, 1, 2} and set(table["layer"]) == set(range(12))
    assert (table["prefix_mass"] > 0).all() and (table["d_loc"] < 1.1).all()  # a 2 x 2 grid, and a class token


def test_lpa_in_a_timm_backbone_trains_is_saved_and_is_measured(toy, tmp_path):
    settings = TINY | {"epochs": 1, "epochs_first": 1, "finetune_epochs": 1, "images_per_class": 6, "scenario": "B2-2"}
    run = dataclasses.replace(toy, **settings, n_lpa=12, lpa_start="content", lambda_init=0.02)
    directory = train(run, tmp_path / "run")
    start, end = directory.new_model(0), directory.model(2)
    # In the last block the class token alone is read, and it is nowhere: its v gets no gradient.
    for block, trained in zip(start.backbone.blocks[:-1], end.backbone.blocks[:-1], strict=True):
        assert block.attn.content_scale.tolist() == [1.0] * 3 and not block.attn.pos_weight.any()
        assert trained.attn.pos_weight.any() and not torch.equal(trained.attn.content_scale, block.attn.content_scale)
    plan = make_plan([str(directory.path)], n=4)
    table = survey((make() for make in plan.subjects), plan.images).nonlocality
    scales = table[table["task"] == 2].set_index(["layer", "head"])["content_scale"]
    for (layer, head), scale in scales.items():
        assert scale == pytest.approx(end.backbone.blocks[layer].attn.content_scale[head].item())
    few = dataclasses.replace(run, n_lpa=1, lpa_start="local")
    assert create_model(few, (8, 8)).backbone.blocks[0].attn.content_scale.tolist() == pytest.approx([0.02] * 3)


def test_mean_pooling(toy):
    run = dataclasses.replace(toy, **TINY, n_lpa=0, global_pool="avg")
    model = create_model(run, (8, 8)).eval()
    assert model.backbone.global_pool == "avg"
    x = torch.randn(2, 3, 8, 8)
    tokens = model.backbone.forward_features(x)[:, model.num_prefix_tokens :]
    expected = model.backbone.fc_norm(tokens.mean(1))
    assert torch.allclose(model.forward_features(x)[:, 0], expected, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["deit_tiny_distilled_patch16_224", "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"]
)
def test_other_families_make_features(name, toy):
    run = dataclasses.replace(toy, model=f"timm/{name}", n_lpa=0, patch_size=4)
    model = create_model(run, (32, 32)).eval()
    model.grow(3)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"model": "timm/vit_tinny_patch16_224"},
            "timm has no model 'vit_tinny_patch16_224'; near: vit_tiny_patch16_224",
        ),
        ({"model": "vit_tiny_patch16_224"}, "neither convit nor of the form timm/NAME"),
        ({"model": "timm/vit_tiny_patch16_224", "method": "dytox"}, "goes with method=baseline"),
        (
            {"model": "timm/vit_tiny_patch16_224", "n_lpa": 13, "patch_size": 4},
            "there is no layer 12: .* has 12 blocks",
        ),
        (
            {"model": "timm/swin_tiny_patch4_window7_224", "n_lpa": 1, "patch_size": 1},
            "swin.* cannot be made|no blocks over",
        ),
        (
            {"model": "timm/vit_tiny_patch16_224", "lpa_start": "content"},
            "lpa_start=content is for timm models with n_lpa",
        ),
        ({"lpa_start": "content", "n_lpa": 1}, "lpa_start=content is for timm models"),
        (
            {"model": "timm/vit_tiny_patch16_224", "n_lpa": 1, "positional_start": "random"},
            "is for convit; lpa_start is for",
        ),
        ({"model": "timm/resnet18"}, "cannot be made for image size"),
        ({"global_pool": "avg"}, "global_pool=avg is for timm models"),
        ({"global_pool": "max"}, "global_pool='max' is none of nothing, token, avg"),
    ],
)
def test_bad_model(changes, words, toy):
    with pytest.raises(ValueError, match=words):
        create_model(dataclasses.replace(toy, **{"n_lpa": 0, **changes}), (8, 8))


def told(run) -> list[str]:
    """What the dry run says, in the order of saying."""
    parts = []
    dry_run.describe_plan(run, echo=parts.append)
    return parts


def test_dry_run_tells_tasks_memory_rates_time_and_disk(toy):
    table, estimate, *_ = told(toy)
    assert (
        " MB at its largest" in table and "estimated time" not in table
    )  # the table comes before anything is measured
    assert estimate.startswith("estimated time: ")
    lines = [line.split() for line in table.splitlines()]
    text = " ".join(table.split())
    assert lines[4] == ["1", "4", "finetune", "20", "2", "2", "2.0e-04,", "2.0e-04", "5", "of", "4"]
    assert "14 steps at batch 16, 224 images; 18 exemplars at the end, memory shared" in text
    joint = told(toy.joint())[0]
    assert "finetune" not in joint and "0 exemplars" in joint


def test_estimate_counts_training_prediction_and_herding(toy, monkeypatch):
    """A second an image of training, 1000 of prediction: 224 in training, 72 herded, test images of 1, 2, 3 tasks."""
    monkeypatch.setattr(dry_run, "seconds_per_image", lambda *_: 1.0)
    monkeypatch.setattr(dry_run, "seconds_of_prediction", lambda *_: 1000.0)
    dataset = load_dataset(toy)
    directory = checkpoint.describe("run", toy, dataset)
    dataset = in_class_order(dataset, directory)
    tests = [len(task.select(dataset.test.labels)) for task in directory.scenario]
    predicted = 3 * tests[0] + 2 * tests[1] + tests[2]
    phases = plan(directory, dataset)
    assert dry_run.estimate(directory, dataset, phases, "cpu") == 224 + 1000 * (72 + predicted)


def test_measuring_a_step_leaves_no_trace(toy, toy_run):
    before = torch.get_rng_state()
    dataset = in_class_order(load_dataset(toy), toy_run)
    for phase in plan(toy_run, dataset):
        assert 0 < dry_run.seconds_per_image(toy_run, dataset, phase, "cpu", dry_run.Stopwatch()) < 60
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "seconds, words",
    [(3, "3 seconds"), (119.6, "120 seconds"), (400, "6.7 minutes"), (7200, "2.0 hours"), (1e6, "11.6 days")],
)
def test_duration(seconds, words):
    assert dry_run.duration(seconds) == words


def test_stopwatch_takes_the_fastest_turn_and_sees_who_waits():
    watch, turns = dry_run.Stopwatch(), iter([0.0, 0.09, 0.02, 0.09, 0.09, 0.09])
    fastest = watch.fastest(lambda: time.sleep(next(turns)))
    assert fastest < 0.08 and watch.slowdown > 3  # asleep, it is given no CPU time: as where others are in the way
    busy, end = dry_run.Stopwatch(), []

    def compute():
        end.append(time.thread_time() + 0.02)
        while time.thread_time() < end[-1]:
            pass

    assert busy.fastest(compute) >= 0.02 and busy.cpu == pytest.approx(0.02, rel=0.2)


def test_dry_run_says_when_the_machine_is_busy(toy, monkeypatch):
    monkeypatch.setattr(dry_run, "seconds_per_image", lambda *_: 1.0)
    monkeypatch.setattr(dry_run, "seconds_of_prediction", lambda *_: 0.0)
    for slowdown, said in ((1.1, 2), (2.0, 3)):
        monkeypatch.setattr(dry_run.Stopwatch, "slowdown", slowdown)
        assert len(told(toy)) == said
    words = " ".join(told(toy)[2].split())
    assert "2.0 times their CPU time" in words and "112 seconds" in words
