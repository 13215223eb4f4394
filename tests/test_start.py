"""Backbones that start from weights: which file, what of it, and that a run knows it again."""

import dataclasses
import shutil

import huggingface_hub
import pytest
import timm
import torch
from conftest import TINY, invoke, run_ok
from safetensors.torch import load_file, save_file

from cil import checkpoint, fit, recipes, start
from cil.checkpoint import START, open_run
from cil.fit import Learner
from cil.progress import training
from cil.schedule import main_phase
from cil.session import Progress
from cil.train import in_class_order, load_dataset, train
from locality_probe.plan import make_plan
from locality_probe.spectra import spectra
from locality_probe.survey import survey
from locality_probe.transfer import transfer


def run_from(weights, **changes):
    """Two tasks of digits by timm's test_vit, which is 6 blocks of dimension 64, at 16 pixels in patches of 4."""
    settings = TINY | {
        "model": "timm/test_vit",
        "patch_size": 4,
        "input_size": 16,
        "weights": str(weights),
        "memory": 4,
    }
    return dataclasses.replace(recipes.find("demo-baseline"), **(settings | changes))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights of timm's test_vit as timm saves them: for 160 pixels, patches of 16 and 1000 classes."""
    torch.manual_seed(7)
    model = timm.create_model("test_vit")
    torch.nn.init.normal_(model.pos_embed)
    path = tmp_path_factory.mktemp("weights") / "test_vit.safetensors"
    save_file(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def trained(weights, tmp_path_factory):
    """A folder with `run`, its joint twin, and the same with LPA. Tests read it."""
    root = tmp_path_factory.mktemp("runs")
    run = run_from(weights)
    train(run, root / "run")
    train(run.joint(), root / "run-joint")
    train(dataclasses.replace(run, n_lpa=6, lpa_start="content"), root / "lpa")
    return root


def test_the_network_is_the_one_that_timm_makes_of_the_file(trained, weights):
    """Position embedding and patch projection are resampled, the classifier is left out."""
    ours = open_run(trained / "run").new_model(0).backbone
    theirs = timm.create_model(
        "test_vit",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(weights)},
        num_classes=0,
        img_size=16,
        patch_size=4,
    )
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    assert ours.pos_embed.shape == (1, 17, 64)


def test_every_network_of_a_run_and_of_its_twins_starts_there(trained):
    run, joint, lpa = (open_run(trained / name) for name in ("run", "run-joint", "lpa"))
    backbones = [d.new_model(t).backbone.state_dict() for d, t in ((run, 0), (joint, 0), (joint, 1), (lpa, 0))]
    for other in backbones[1:]:
        assert all(torch.equal(backbones[0][name], other[name]) for name in backbones[0])
    heads = [joint.new_model(task).heads[0].fc.weight for task in (0, 1)]
    assert len(heads[0]) == 2 and len(heads[1]) == 4


def test_lpa_that_starts_from_content_changes_nothing_at_first(trained):
    x = torch.rand(2, 3, 8, 8)
    plain, local = (open_run(trained / name).new_model(0).eval() for name in ("run", "lpa"))
    torch.testing.assert_close(plain.forward_features(x), local.forward_features(x))
    assert plain.forward_features(x).shape == (2, 1, 64)


def test_a_run_knows_its_weights_again(trained, weights, tmp_path):
    """By their SHA-256: they may lie elsewhere, or be gone, when a run goes on; others are refused."""
    shutil.copytree(trained / "run", tmp_path / "run")
    there = open_run(tmp_path / "run").run
    assert there.weights_sha256 == start.sha256(weights) and (tmp_path / "run" / START).is_file()
    copied = shutil.copy(weights, tmp_path / "elsewhere.safetensors")
    train(run_from(copied), tmp_path / "run")
    assert there.is_twin_of(dataclasses.replace(there, weights=str(copied)).joint())
    gone = tmp_path / "gone.safetensors"
    shutil.copy(weights, gone)
    train(run_from(gone), tmp_path / "other")
    gone.unlink()
    assert train(run_from(gone), tmp_path / "other").finished
    state = load_file(weights)
    save_file(state | {"norm.bias": state["norm.bias"] + 1}, tmp_path / "changed.safetensors")
    with pytest.raises(ValueError, match=r"holds another run \(weights_sha256="):
        train(run_from(tmp_path / "changed.safetensors"), tmp_path / "run")
    shutil.copy(tmp_path / "changed.safetensors", copied)
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    begun = (tmp_path / "again/run.json").read_text()
    (tmp_path / "again/run.json").write_text(begun.replace(str(weights), str(copied)))
    with pytest.raises(
        ValueError, match=r"holds another run \(weights_sha256="
    ):  # the same name, and not the same file
        train(run_from(copied), tmp_path / "again")
    with pytest.raises(ValueError, match="has the SHA-256 "):
        train(run_from(weights, weights_sha256="0" * 64), tmp_path / "third")
    assert not (tmp_path / "third").exists()


def test_cut_and_resumed_it_is_the_undisturbed_run(trained, weights, tmp_path, monkeypatch):
    whole, step, left = open_run(trained / "run"), Learner.step, [2]

    def cut(*arguments):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        step(*arguments)

    monkeypatch.setattr(fit, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(Learner, "step", cut)
    with pytest.raises(KeyboardInterrupt):
        train(run_from(weights), tmp_path / "run")
    again = train(run_from(weights), tmp_path / "run")
    for task in whole.tasks:
        assert whole.weights_path(task).read_bytes() == again.weights_path(task).read_bytes()


def test_the_instrument_measures_them_as_other_runs(trained, capsys):
    plan = make_plan([str(trained / "run"), str(trained / "lpa")], n=8)
    found = survey((make() for make in plan.subjects), plan.images).nonlocality
    first = found[found["task"] == -1].groupby("run")["d_loc"].apply(list)
    assert first["run"] == first["run-joint"] == pytest.approx(first["lpa"], rel=1e-5)
    assert set(found["task"]) == {-1, 0, 1} and (found["d_loc_pixels"] == 2 * found["d_loc"]).all()
    directories = [open_run(trained / "run")]
    assert len(spectra(directories, n=140).summary)
    assert len(transfer(directories, [1], per_class=5, test_per_class=5).transfer)


def test_without_its_start_only_the_initial_network_is_missing(trained, tmp_path):
    shutil.copytree(trained / "run", tmp_path / "run")
    (tmp_path / "run" / START).unlink()
    directory = open_run(tmp_path / "run")
    assert directory.model(1)
    with pytest.raises(ValueError, match="is not there, from which the run starts"):
        directory.new_model(0)


def learner_of(run, tmp_path):
    directory = train(dataclasses.replace(run, epochs_first=1), tmp_path / "run")
    model, dataset = directory.new_model(0), in_class_order(load_dataset(run), directory)
    fit.freeze(model, fit.frozen_parts(directory, main_phase(directory, 0, torch.arange(4)[None])))
    return directory, Learner(directory, dataset, model, None, 0, "cpu")


def test_frozen_blocks_stay_as_they_are(weights, tmp_path):
    directory, learner = learner_of(run_from(weights, frozen_blocks=2, n_lpa=6, lpa_start="content"), tmp_path)
    before, after = directory.new_model(0).backbone.state_dict(), directory.model(1).backbone.state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    shallow = {n for n in before if n.startswith(("patch_embed.", "pos_embed", "cls_token", "blocks.0.", "blocks.1."))}
    # Of the last block the class token alone is read, to which v.r is nothing.
    assert same == shallow | {"blocks.5.attn.pos_weight"}
    assert not learner.model.backbone.blocks[1].training and learner.model.backbone.blocks[2].training


def test_learning_rates_decay_from_the_heads_down(weights, tmp_path):
    _, learner = learner_of(run_from(weights, layer_decay=0.5, n_lpa=6), tmp_path)
    learner.set_learning_rate(0.1)
    rates = {
        name: group["lr"] for group in learner.optimizer.param_groups for p in group["params"]
        for name, other in learner.model.named_parameters() if p is other
    }  # fmt: skip
    assert len(rates) == len(list(learner.model.parameters())) and learner.learning_rate == 0.1
    assert rates["heads.0.fc.weight"] == 0.1
    assert rates["backbone.blocks.5.attn.pos_weight"] == rates["backbone.blocks.5.mlp.fc1.bias"]
    for block in range(5):
        shallow, deep = (rates[f"backbone.blocks.{i}.attn.qkv.weight"] for i in (block, block + 1))
        assert shallow == pytest.approx(deep / 2)
    assert rates["backbone.patch_embed.proj.weight"] == pytest.approx(rates["backbone.blocks.0.norm1.bias"] / 2)


def test_pixels_as_the_weights_want_them(weights):
    config = timm.get_pretrained_cfg("test_vit")
    assert load_dataset(run_from(weights, normalization="model")).mean == config.mean == (0.5, 0.5, 0.5)
    assert load_dataset(run_from(weights)).mean != config.mean


def test_a_run_that_another_starts_from_is_trained_first(tmp_path, monkeypatch):
    first = dataclasses.replace(run_from(""), scenario="B4-4", epochs_first=1, memory=0)
    monkeypatch.setitem(recipes.RECIPES, "first", lambda: first)
    run, seen = run_from("recipe:first"), []
    directory = train(run, tmp_path / "second", report=lambda progress: seen.append(progress.run))
    assert list(dict.fromkeys(seen)) == ["first", "second"]
    learned, begun = load_file(tmp_path / "first/task_00.safetensors"), directory.new_model(0).backbone.state_dict()
    assert all(torch.equal(begun[name], learned[f"backbone.{name}"]) for name in begun)
    seen.clear()
    train(run.joint(), tmp_path / "second-joint", report=lambda progress: seen.append(progress.run))
    assert set(seen) == {"second-joint"}
    monkeypatch.setitem(recipes.RECIPES, "first", lambda: run)
    with pytest.raises(ValueError, match="first itself starts from recipe:first"):
        train(run, tmp_path / "round/second")


@pytest.mark.parametrize("shown", [True, False])
def test_progress_of_both(shown, capsys):
    with training("second", shown) as report:
        for run in ("first", "first", "second"):
            report(Progress(0, 1, "fit", 0, 1, 0.5, 0.1, 1, 2, 4, run=run))
    said = capsys.readouterr().err
    assert [name in said for name in ("first: ", "second: ")] == [shown] * 2


def test_a_run_that_another_process_trains_first_is_waited_for(tmp_path, monkeypatch):
    run, asked = run_from("recipe:demo-baseline"), []
    monkeypatch.setattr(start, "WAIT", 0.0)
    monkeypatch.setattr(checkpoint, "is_locked", lambda path: True)

    def busy_twice(other, path):
        asked.append((other.recipe, path))
        if len(asked) < 3:
            raise ValueError("another process is training")
        raise OSError("seen")

    with pytest.raises(OSError, match="seen"):
        start.settle(run, tmp_path / "run", busy_twice)
    assert asked == [("demo-baseline", tmp_path / "demo-baseline")] * 3


def test_weights_of_the_hub(weights, tmp_path, monkeypatch):
    def download(place, file):
        assert (place, file) == ("timm/test_vit.r160_in1k", "model.safetensors")
        return str(weights)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    run, path = start.settle(run_from("hub"), tmp_path / "run", train)
    assert str(path) == str(weights) and run.weights_sha256 == start.sha256(weights)

    def unreachable(place, file):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(
        ValueError, match=r"timm/test_vit.r160_in1k cannot be fetched from the hub .*: give --set weights="
    ):
        start.settle(run_from("hub"), tmp_path / "run", train)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {k: v for k, v in s.items() if not k.startswith("blocks.5.")}, "at 12 of 78 tensors of its trunk"),
        (
            lambda s: {k: v[..., :32] if k == "norm.weight" else v for k, v in s.items()},
            r"norm.weight: \(32,\) in the file",
        ),
        (lambda s: s | {"norm.weight": s["norm.weight"] * float("nan")}, "NaN or infinite values in norm.weight"),
        (lambda s: s | {"blocks.6.norm1.weight": s["norm.weight"].clone()}, "holds 1 others"),
    ],
    ids=["a block is missing", "another width", "not finite", "a block more"],
)
def test_weights_that_do_not_fit(weights, tmp_path, change, words):
    save_file({k: v.contiguous() for k, v in change(load_file(weights)).items()}, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=words):
        train(run_from(tmp_path / "odd.safetensors"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            ["weights=w.safetensors"],
            "for timm models alone, like model=timm/vit_base_patch16_224: weights=w",
        ),
        (
            ["input_size=16", "layer_decay=0.5"],
            "vit_base_patch16_224: input_size=16, layer_decay=0.5",
        ),
        (["model=timm/test_vit", "patch_size=1", "weights=nowhere"], "weights=nowhere is no file, nor hub"),
        (["model=timm/test_vit", "patch_size=1", "weights=recipe:nothing"], "no recipe 'nothing'"),
        (["model=timm/test_vit", "patch_size=1", "frozen_blocks=7"], "frozen_blocks=7 is more than the 6 blocks"),
        (["weights_sha256=ab"], "weights_sha256 goes with weights"),
    ],
)
def test_what_does_not_go_together(settings, words, tmp_path):
    result = invoke("train", "demo-baseline", "--out", tmp_path / "run", *[x for s in settings for x in ("--set", s)])
    assert result.exit_code in (1, 2) and words in " ".join(result.output.split()) and "Traceback" not in result.output
    assert not (tmp_path / "run").exists()


def test_dry_run_needs_no_weights():
    shown = " ".join(run_ok("train", "finetune-demo-baseline-lpa", "--dry-run").output.split())
    assert "starts from finetune-demo-pretraining beside it, which is trained first" in shown
