"""Every random number of a step comes from one place, on the CPU, and from nowhere else."""

import dataclasses

import pytest
import torch

from cil import checkpoint, draws
from cil.augment import parse
from cil.draws import of_epoch, of_step, operations
from cil.fit import Learner, freeze, frozen_parts
from cil.models import DropPath, create_model, drop_path_calls
from cil.run import Run
from cil.schedule import main_phase
from cil.train import in_class_order, load_dataset, train

RUN = Run(rand_augment="rand-m9-mstd0.5-inc1", mixup=0.8)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_step_draws_what_the_run_asks_for():
    drawn = of_step(RUN, 6, [(0.1, (1,)), (0.2, (1, 3))], generator())
    assert drawn.crop.shape == (2, 6) and drawn.crop.max() <= 8 and drawn.flip.dtype == torch.bool
    assert drawn.operations.source.shape == (2, 6) and 0 <= drawn.lam <= 1
    assert [mask.shape for mask in drawn.drop_path] == [(6,), (6, 3)]
    nothing = of_step(Run(crop_padding=0, flip=False, rand_augment="", mixup=0.0), 6, [], generator())
    assert (nothing.crop, nothing.flip, nothing.operations, nothing.lam, nothing.drop_path) == (
        None,
        None,
        None,
        None,
        [],
    )


def test_rows_that_stay_grow_by_what_is_dropped():
    (mask,) = of_step(RUN, 20_000, [(0.25, (1,))], generator()).drop_path
    assert mask.unique().tolist() == pytest.approx([0, 4 / 3]) and mask.mean() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("multiple", [1, 8, 32])
def test_an_operation_is_on_each_image_once_a_layer(multiple):
    """An image is where its source says, and the others are as they were; more places change nothing else."""
    n, drawn = 64, operations(64, parse(RUN.rand_augment), generator(), multiple)
    exact = operations(64, parse(RUN.rand_augment), generator())
    places = drawn.rows.shape[2]
    assert places % multiple == 0 and places - exact.rows.shape[2] < multiple
    for rows, argument, source, fewer in zip(*drawn, exact.argument, strict=True):
        moved = source >= n
        assert 10 < moved.sum() < 54 and torch.equal(source[~moved], torch.arange(n)[~moved])
        assert torch.equal(rows.flatten()[source[moved] - n], torch.arange(n)[moved])
        assert len(source.unique()) == n
        assert torch.equal(argument[:, : fewer.shape[1]], fewer) and not argument[:, fewer.shape[1] :].any()


def test_orders_of_two_epochs_differ_and_repeat():
    (first, seeds), (again, _), (other, _) = (of_epoch(RUN, 0, "fit", epoch, 50) for epoch in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert sorted(first.tolist()) == list(range(50)) and len(seeds.unique()) == 50
    repeated = of_epoch(dataclasses.replace(RUN, repeats=3), 0, "fit", 0, 50)[0]
    assert len(repeated) == 50 and len(repeated.unique()) == 17


@pytest.mark.parametrize(
    ("changes", "calls"),
    [
        ({"drop_path": 0.2}, [(1,)] * 4 + [(1, 1)] * 2),  # two a block, of which the first block drops nothing
        ({"drop_path": 0.2, "method": "dytox"}, [(1,)] * 4 + [(1, 2)] * 2),  # separately for each task token
        ({"drop_path": 0.0}, []),
        ({"model": "timm/vit_tiny_patch16_224", "patch_size": 4, "drop_path": 0.2}, [(1,)] * 22),
        ({"model": "timm/convit_tiny", "patch_size": 4, "drop_path": 0.2}, None),
    ],
    ids=str,
)
def test_calls_of_stochastic_depth_are_found_beforehand(changes, calls, toy):
    run = dataclasses.replace(toy, **{"depth": 4, "n_lpa": 0, **changes})
    model = create_model(run, (8, 8))
    for _ in range(2):
        model.grow(2)
    modes = {name: module.training for name, module in model.train().named_modules()}
    found = drop_path_calls(model, (8, 8))
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert calls is None or [shape for _, shape in found] == calls
    # As many as are used up in a pass of a batch.
    for path, shape in found:
        path.kept.append(torch.ones(5 * shape[0], *shape[1:]))
    model.forward_features(torch.randn(5, 3, 8, 8))
    assert not any(path.kept for path, _ in found)
    for path, _ in found[1:]:
        path.eval()
    assert len(drop_path_calls(model, (8, 8))) <= 2  # what is frozen draws nothing


def test_nothing_but_draws_draws(toy, monkeypatch):
    """A step with everything on leaves torch's generator where the draws of the step left it."""
    run = dataclasses.replace(toy, drop_path=0.3, rand_augment=RUN.rand_augment, mixup=0.8, crop_padding=1, flip=True)
    dataset = load_dataset(run)
    directory = checkpoint.describe("run", run, dataset)
    dataset, model = in_class_order(dataset, directory), directory.new_model(0)
    freeze(model, frozen_parts(directory, main_phase(directory, 0, torch.arange(4)[None])))
    learner = Learner(directory, dataset, model, None, 0, "cpu")
    states, head = [], model.forward_head

    def drawing(*arguments):
        drawn = of_step(*arguments)
        states.append(torch.get_rng_state())
        return drawn

    def ending(features):
        states.append(torch.get_rng_state())
        return head(features)

    monkeypatch.setattr(draws, "of_step", drawing)
    monkeypatch.setattr(model, "forward_head", ending)
    learner.step(torch.arange(4), torch.tensor([0, 1, 0, 1]), (0, "fit", 0, 0))
    assert len(states) == 2 and torch.equal(*states)
    assert any(isinstance(module, DropPath) and module.p for module in model.modules())


def test_checkpoints_inside_tasks_change_nothing_and_are_networks(toy, tmp_path):
    """Weights after 0, 1, 3, 4 and 9 steps of the network, which for a joint twin begins anew at each task."""
    run = dataclasses.replace(toy, checkpoints="0,1,3,4,9")
    kept = train(run, tmp_path / "kept")
    plain = train(toy, tmp_path / "plain")
    for task in plain.tasks:
        assert kept.weights_path(task).read_bytes() == plain.weights_path(task).read_bytes()
    steps = plain.table("training").groupby("task")["steps"].sum().cumsum().tolist()
    expected = [[s for s in (0, 1, 3, 4, 9) if (before < s <= after or s == before == 0)] for before, after in
                zip([0, *steps], steps, strict=False)]  # fmt: skip
    assert [kept.checkpoints(task) for task in kept.tasks] == expected and sum(map(len, expected)) == 5
    start = kept.new_model(0).state_dict()
    assert all(torch.equal(value, start[name]) for name, value in kept.model(0, 0).state_dict().items())
    joint = train(run.joint(), tmp_path / "kept-joint")
    assert [0, 1] == joint.checkpoints(0)[:2] == joint.checkpoints(2)[:2] and joint.run.is_twin_of(plain.run)
    with pytest.raises(ValueError, match=r"no checkpoint at step 2 of task 0 in .*; there: 0, 1$"):
        kept.model(0, 2)


@pytest.mark.parametrize("text", ["10,3", "1,1", "-1", "a", "1,,2", "0, 10", "1e3", "9999999999"])
def test_checkpoints_are_ascending_numbers(text):
    with pytest.raises(ValueError, match="is no list of ascending numbers of steps, like 0,10,100"):
        Run(checkpoints=text)
