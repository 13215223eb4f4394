"""Training on a simulated CUDA device: the CPU's losses, one copy a step, nothing waited for between two readings."""

import contextlib
import dataclasses

import numpy as np
import pytest
import torch
from pictures import imagenet_like
from simulated_cuda import OnCuda, simulated

from cil import device, fit, graphs
from cil.fit import Learner
from cil.graphs import Replay
from cil.train import train

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
# What is kept for a device from one call to the next is either simulated or not.
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="simulates the GPU that is here")
EVERYTHING = {
    "num_classes": 4, "rand_augment": "rand-m9-mstd0.5-inc1", "flip": True, "drop_path": 0.3, "crop_padding": 2,
}  # fmt: skip
SYSTEMS = {
    "gpsa and lpa": EVERYTHING,
    "mhsa": EVERYTHING | {"attention": "mhsa", "n_lpa": 0},
    "dytox": EVERYTHING | {"method": "dytox", "kd_rows": "all"},
    "memory of each process": EVERYTHING | {"memory_mode": "per-process:2", "herding_crop": True},
    "joint": {"num_classes": 4, "training": "joint"},
    "images that are decoded": EVERYTHING
    | {
        "dataset": "imagenet100",
        "class_order": "alphabetical",
        "image_size": 16,
        "patch_size": 4,
        "memory": 12,
        "batch_size": 4,
    },
    "timm with lpa": {"num_classes": 2, "model": "timm/test_vit", "n_lpa": 1, "drop_path": 0.1, "patch_size": 4},
}


def with_pictures(run, folder):
    """The run, with files to read where it trains on files."""
    if run.dataset != "imagenet100":
        return run
    imagenet_like(folder, {"train": 7, "val": 2})
    return dataclasses.replace(run, data_dir=str(folder))


@NO_GPU
@pytest.mark.parametrize("amp", ["none", "bf16"])
@pytest.mark.parametrize("changes", SYSTEMS.values(), ids=SYSTEMS)
def test_training_is_the_cpus_and_waits_for_nothing(changes, amp, toy, tmp_path, monkeypatch):
    run = with_pictures(dataclasses.replace(toy, amp=amp, **changes), tmp_path / "images")
    steps, step = [], Learner.step
    here = train(run, tmp_path / "cpu")
    with simulated() as cuda:

        def counted(*arguments):
            before = cuda.copies.total(), cuda.waits.total()
            step(*arguments)
            steps.append((cuda.copies.total() - before[0], cuda.waits.total() - before[1]))

        monkeypatch.setattr(Learner, "step", counted)
        there = train(run, tmp_path / "cuda", "cuda")
    assert steps and set(steps) == {(1, 0)}
    losses = [directory.table("training")["loss"] for directory in (there, here)]
    np.testing.assert_allclose(*losses, rtol=1e-6 if amp == "none" else 0.02)  # bf16 rounds otherwise in other kernels
    if amp == "none":
        assert there.table("accuracy").equals(here.table("accuracy"))


@GPU
@pytest.mark.parametrize("amp", ["none", "bf16"])
@pytest.mark.parametrize("changes", SYSTEMS.values(), ids=SYSTEMS)
def test_training_on_a_gpu(changes, amp, toy, tmp_path, monkeypatch):
    """Runs with and without graphs, one cut inside an epoch, are equal bit by bit, near the CPU's, and no step waits."""
    run = with_pictures(dataclasses.replace(toy, amp=amp, **changes), tmp_path / "images")
    step, capture, cut, captured = Learner.step, Replay.capture, [], []

    def watched(*arguments):
        if cut and cut.pop():
            raise KeyboardInterrupt
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def unwatched(*arguments):
        torch.cuda.set_sync_debug_mode("default")
        try:
            captured.append(capture(*arguments))
        finally:
            torch.cuda.set_sync_debug_mode("error")
        return captured[-1]

    here = train(run, tmp_path / "cpu")
    monkeypatch.setattr(Learner, "step", watched)
    monkeypatch.setattr(Replay, "capture", unwatched)
    whole = train(run, tmp_path / "whole", "cuda")
    assert captured
    with monkeypatch.context() as without_graphs:
        without_graphs.setattr(graphs, "MOST", 0)
        plain = train(run, tmp_path / "plain", "cuda")
    monkeypatch.setattr(fit, "SAVE_EVERY", 0.0)
    cut += [True, False]
    with pytest.raises(KeyboardInterrupt):
        train(run, tmp_path / "again", "cuda")
    again = train(run, tmp_path / "again", "cuda")
    for task in whole.tasks:
        for other in (plain, again):
            assert whole.weights_path(task).read_bytes() == other.weights_path(task).read_bytes()
    losses = [directory.table("training")["loss"] for directory in (whole, plain, again, here)]
    assert losses[0].equals(losses[1]) and losses[0].equals(losses[2])
    np.testing.assert_allclose(losses[0], losses[3], rtol=5e-3 if amp == "none" else 0.02)


@NO_GPU
def test_cut_and_resumed_on_cuda_is_the_undisturbed_run(toy, tmp_path, monkeypatch):
    run = dataclasses.replace(toy, **EVERYTHING)
    step, left = Learner.step, [3]

    def cut(*arguments):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        step(*arguments)

    with simulated():
        whole = train(run, tmp_path / "whole", "cuda")
        monkeypatch.setattr(fit, "SAVE_EVERY", 0.0)
        monkeypatch.setattr(Learner, "step", cut)
        with pytest.raises(KeyboardInterrupt):
            train(run, tmp_path / "cut", "cuda")
        resumed = train(run, tmp_path / "cut", "cuda")
    for task in whole.tasks:
        assert whole.weights_path(task).read_bytes() == resumed.weights_path(task).read_bytes()
    losses = [d.table("training").drop(columns="seconds") for d in (whole, resumed)]
    assert losses[0].equals(losses[1])


@NO_GPU
def test_loss_that_is_not_finite_is_refused_before_anything_is_saved(toy, tmp_path):
    with simulated(), pytest.raises(ValueError, match=r"the loss is (nan|inf) in task 0, fit epoch \d"):
        train(dataclasses.replace(toy, num_classes=2, lr_first=1e30, warmup_epochs=0), tmp_path / "run", "cuda")
    assert not list((tmp_path / "run").glob("resume/*")) and not list((tmp_path / "run").glob("*.safetensors"))


@NO_GPU
def test_send_brings_everything_by_one_copy():
    parts = (torch.arange(3), [torch.tensor([True, False]), None, torch.empty(0)], 2.5, torch.rand(2, 3))
    assert device.send(parts, "cpu") is parts
    with simulated() as cuda:
        numbers, (flags, nothing, empty), plain, matrix = device.send(parts, "cuda")
        assert cuda.copies.total() == 1 and not cuda.waits
        assert all(isinstance(t, OnCuda) for t in (numbers, flags, empty, matrix)) and nothing is None and plain == 2.5
        for sent, own in ((numbers, parts[0]), (flags, parts[1][0]), (empty, parts[1][2]), (matrix, parts[3])):
            assert sent.elem.equal(own) and sent.dtype == own.dtype


@pytest.mark.parametrize("matmul", ["ieee", "tf32"])
def test_precision_of_training_does_not_outlast_it(matmul):
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    with pytest.raises(RuntimeError), device.repeatable("cuda", matmul):
        assert [b.allow_tf32 for b in backends] == [
            matmul == "tf32"
        ] * 2 and torch.are_deterministic_algorithms_enabled()
        raise RuntimeError
    assert not any(b.allow_tf32 for b in backends) and not torch.are_deterministic_algorithms_enabled()


class Graph:
    """A CUDA graph in place of torch's: replayed, it does the work again on what its packet holds by then."""

    def pool(self):
        return 0, 0

    def replay(self):
        _, there, gradients = next(entry for entry in self.owner.captured.values() if entry[0] is self)
        for parameter in self.owner.parameters:
            parameter.grad = None
        self.work(*device.unpack(self.parts, there))
        for parameter, gradient in zip(self.owner.parameters, gradients, strict=True):
            gradient.copy_(parameter.grad)
            parameter.grad = gradient
        self.replays += 1


@pytest.fixture
def replay(monkeypatch):
    """A Replay of a small model's work, on the CPU, with Graph; and that work."""
    model, sums = torch.nn.Linear(3, 2), torch.zeros(1)
    made = Replay(model.parameters(), sums)

    def work(x, weight, factor):
        loss = (weight * model(x).square().mean()) * factor
        loss.backward()
        sums.add_(loss.detach())

    @contextlib.contextmanager
    def capturing(graph, **_):
        before = sums.clone()
        yield
        sums.copy_(before)  # a capture does nothing
        graph.owner, graph.work, graph.replays = made, work, 0

    class Stream:
        def __init__(self, device=None):
            pass

        def wait_stream(self, other):
            pass

    for name, fake in {
        "Stream": Stream, "current_stream": Stream, "stream": contextlib.nullcontext, "CUDAGraph": Graph,
        "graph": capturing, "synchronize": lambda device: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    return made, work, model, sums


def parts_of(rows, factor=1):
    return torch.randn(rows, 3), torch.rand(()), factor


def test_graphs_are_captured_by_layout_and_read_what_is_sent(replay):
    made, work, model, sums = replay
    for turn, parts in enumerate([parts_of(4), parts_of(4), parts_of(5), parts_of(4, factor=2), parts_of(4)]):
        model.zero_grad(set_to_none=True)
        before = sums.clone()
        work(*parts)
        expected, loss = [p.grad.clone() for p in model.parameters()], sums - before
        sums.copy_(before)
        capture = Replay.capture

        def with_parts(self, work, parts, packet, capture=capture):
            found = capture(self, work, parts, packet)
            found[0].parts = parts
            return found

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Replay, "capture", with_parts)
            made(work, parts)
        torch.testing.assert_close(sums, before + loss)
        for p, gradient in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, gradient)
        assert len(made.captured) == [1, 1, 2, 3, 3][turn]
    assert [graph.replays for graph, *_ in made.captured.values()] == [3, 1, 1]


def test_work_that_cannot_be_captured_is_done_as_it_comes(replay):
    made, work, _, sums = replay

    def waiting(*parts):
        waiting.calls += 1
        work(*parts)
        if waiting.calls == 2:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    waiting.calls = 0
    parts = parts_of(4)
    work(*parts)
    once = sums.clone()
    sums.zero_()
    with pytest.warns(
        UserWarning, match="not captured as CUDA graphs: operation not permitted when stream is capturing$"
    ):
        made(waiting, parts)
    torch.testing.assert_close(sums, once)
    made(waiting, parts)
    torch.testing.assert_close(sums, 2 * once)
    assert not made.captured


def test_what_has_no_deterministic_kernel_is_done_all_the_same(toy, tmp_path, monkeypatch):
    """With a warning, and with the draws of stochastic depth that the step has."""
    run, real, failed = dataclasses.replace(toy, num_classes=2, drop_path=0.5), Learner.on_device, []
    whole = train(run, tmp_path / "whole")

    def once(self, *parts):
        if not failed:
            failed.append(1)
            real(self, *parts)
            self.sums.zero_()
            self.drop_paths[0][0].kept.append(torch.zeros(len(parts[1])))
            raise RuntimeError(
                "adaptive_pool_backward_cuda does not have a deterministic implementation, but you set it. And"
            )
        real(self, *parts)

    monkeypatch.setattr(Learner, "on_device", once)
    try:
        with pytest.warns(UserWarning, match="differ by rounding: adaptive_pool_backward_cuda does not have a determ"):
            again = train(run, tmp_path / "again")
    finally:
        torch.use_deterministic_algorithms(False)
    assert whole.weights_path(0).read_bytes() == again.weights_path(0).read_bytes()
