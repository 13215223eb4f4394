"""Batches, learning rates and memories, with the switches for what the released code does otherwise."""

import dataclasses

import pandas as pd
import pytest
import torch

from cil.checkpoint import open_run
from cil.evaluate import predict
from cil.fit import freeze
from cil.run import Run
from cil.schedule import Phase, epoch_batches, exemplars, learning_rate, with_memory
from cil.train import herding_features, in_class_order, load_dataset, train


def phase(n=100, epochs=10, cosine=10, batch_size=8):
    return Phase("fit", 1, torch.arange(n)[None], epochs, 4e-4, batch_size, cosine)


def test_epoch_shows_every_image_once_in_whole_batches():
    batches, seeds = epoch_batches(Run(), phase(), 0)
    assert [len(b) for b in batches] == [8] * 12 == [len(s) for s in seeds]
    assert len(set(torch.cat(batches).tolist())) == 96
    again, other = (epoch_batches(Run(), phase(), epoch)[0] for epoch in (0, 1))
    assert torch.equal(torch.cat(again), torch.cat(batches)) and not torch.equal(torch.cat(other), torch.cat(batches))
    (small,), _ = epoch_batches(Run(), phase(n=5), 0)
    assert sorted(small.tolist()) == list(range(5))


def test_repeated_augmentation_shows_a_third_of_the_images():
    images = torch.cat(epoch_batches(Run(repeats=3), phase(n=96), 0)[0])
    assert sorted(images.bincount()[images.unique()].tolist()) == [3] * 32
    seeds = torch.cat(epoch_batches(Run(repeats=3), phase(n=96), 0)[1])
    assert len(seeds.unique()) == 96  # each time cut in another way


def test_emulated_processes_take_turns_and_read_their_own_memory():
    """Two processes: the same order of places, new images alike, exemplars from each one's own memory."""
    new = torch.arange(20)
    memory = pd.DataFrame(
        {"process": [0] * 4 + [1] * 4, "label": 0, "rank": [0, 1, 2, 3] * 2, "image": range(100, 108)}
    )
    indices = with_memory(new, memory)
    assert indices.shape == (2, 24) and torch.equal(indices[:, :20], new.expand(2, -1))
    two = dataclasses.replace(phase(batch_size=4), indices=indices)
    batches, _ = epoch_batches(Run(batch_size=4, memory_mode="per-process:2"), two, 0)
    order = torch.cat(batches)
    kept = order >= 100
    turns = torch.arange(24) % 2
    assert kept.sum() == 4 and torch.equal(order[kept] >= 104, turns[kept] == 1)
    assert sorted(order[~kept].tolist()) == list(range(20))


def test_a_memory_with_fewer_goes_round():
    memory = pd.DataFrame({"process": [0, 0, 0, 1, 1], "label": 0, "rank": [0, 1, 2, 0, 1], "image": [9, 2, 5, 3, 1]})
    assert exemplars(memory).tolist() == [[2, 5, 9], [1, 3, 1]]


def test_schedule_switches_of_the_released_code():
    run = Run()
    late = dataclasses.replace(run, schedule_late=True)
    rates = [learning_rate(run, phase(), epoch) for epoch in range(10)]
    assert [learning_rate(late, phase(), epoch) for epoch in range(10)] == [rates[0], *rates[:-1]]
    cut = [learning_rate(run, phase(cosine=12), epoch) for epoch in range(10)]
    assert cut[:5] == rates[:5] and cut[9] > rates[9] > run.lr_min
    assert learning_rate(run, phase(cosine=0), 3) == 4e-4


@pytest.fixture(scope="module")
def two_memories(toy, tmp_path_factory):
    run = dataclasses.replace(
        toy, memory_mode="per-process:2", herding_crop=True, repeats=3, schedule_late=True, cosine_epochs_first=4,
        lambda_init_mode="normal", eval_amp="bf16", frozen_eval=False, epochs=1, epochs_first=1,
    )  # fmt: skip
    return train(run, tmp_path_factory.mktemp("released") / "run")


def test_memory_per_process_keeps_up_to_w_budgets(two_memories, toy):
    """The erratum of DyTox: two processes herd for themselves, under random crops, so they keep other images."""
    for task in range(3):
        memory = two_memories.memory(task)
        first, second = (set(part["image"]) for _, part in memory.groupby("process"))
        assert len(first) <= toy.memory and len(second) <= toy.memory
        assert (memory.groupby(["process", "label"]).size() == toy.memory // (2 * task + 2)).all()
    assert first != second and len(first | second) > toy.memory


def test_shared_memory_is_one_list_within_the_budget(toy_runs, toy):
    run = open_run(toy_runs / "toy")
    for task in range(3):
        memory = run.memory(task)
        assert set(memory["process"]) == {0} and memory["image"].is_unique and len(memory) <= toy.memory


def test_herding_crop_is_another_for_each_process_and_off_by_default(two_memories, toy_run):
    dataset = in_class_order(load_dataset(toy_run.run), toy_run)
    new = toy_run.scenario[0].select(dataset.train.labels)

    def features(directory, process):
        return herding_features(directory, dataset, toy_run.model(0), 0, new, process, "cpu")

    assert torch.equal(features(toy_run, 0), features(toy_run, 1))
    assert torch.equal(features(two_memories, 0), features(two_memories, 0))
    assert not torch.equal(features(two_memories, 0), features(two_memories, 1))


def test_frozen_modules_may_train_as_released(toy_run):
    model = toy_run.model(2)
    freeze(model, lambda name: name.startswith("blocks"), frozen_eval=False)
    assert model.blocks.training and not any(p.requires_grad for p in model.blocks.parameters())
    freeze(model, lambda name: name.startswith("blocks"))
    assert not model.blocks[0].training and model.heads.training


@pytest.mark.parametrize("amp, dtype", [("none", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_predictions_in_the_precision_asked_for(amp, dtype, toy_run):
    dataset, seen, model = load_dataset(toy_run.run), [], toy_run.model(2)
    model.heads[0].fc.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    predicted = predict(model, dataset.test, torch.arange(300), dataset.mean, dataset.std, "cpu", amp)
    assert predicted.shape == (300,) and set(seen) == {dtype}


@pytest.mark.parametrize("mode", ["per-process", "per-process:0", "per-process:-1", "both", ""])
def test_unknown_memory_mode(mode):
    with pytest.raises(ValueError, match="memory_mode="):
        Run(memory_mode=mode)


def test_memory_mode_as_the_documentation_of_others_writes_it():
    assert Run().change(["memory.mode=per-process:2"]).memories == 2
    with pytest.raises(ValueError, match=r"per-process:3 does not divide batch_size=256"):
        Run(memory_mode="per-process:3")
