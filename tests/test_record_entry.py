"""A model that was recorded comes back as it was, also after an exception, and its outputs are the same meanwhile."""

from __future__ import annotations

import contextlib
import copy

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from networks import (
    images,
    maps,
    status,
    vit,
    whole,
)
from timm.models.vision_transformer import Attention
from torch import nn

from locality_probe.record import record

pytestmark = pytest.mark.usefixtures("seeded")


class Odd(nn.Module):
    """A network with what a recorder could spoil: running statistics, dropout, frozen parts, hooks of its user."""

    num_prefix_tokens = 0

    def __init__(self, fails: bool = False):
        super().__init__()
        self.patch_embed = timm.layers.PatchEmbed(16, 4, 3, 16)
        self.norm = nn.BatchNorm1d(16)
        self.attn = Attention(16, 2, attn_drop=0.5, proj_drop=0.5)
        self.frozen = nn.Sequential(nn.BatchNorm1d(16), nn.Dropout())
        self.last = Attention(16, 2)
        self.fails = fails

    def forward(self, x):
        x = self.patch_embed(x)
        x = self.frozen(self.norm(x.mT)).mT
        x = x + self.attn(x)
        if self.fails:
            raise ArithmeticError("from the model")
        return self.last(x)


class AlwaysFrozen(nn.Sequential):
    """The usual way to freeze: train() is overridden."""

    def train(self, mode=True):
        return super().train(False)


def odd(fused: bool = True, fails: bool = False) -> Odd:
    model = Odd(fails).train()
    model.frozen.eval()
    model.always = AlwaysFrozen(nn.Dropout())
    model.frozen.requires_grad_(False)
    model.attn.fused_attn = model.last.fused_attn = fused
    model.register_forward_hook(lambda *_: None)
    model.attn.register_forward_pre_hook(lambda *_: None)
    return model


def state(model: nn.Module) -> dict[str, object]:
    """All of a model that could change: tensors by value, hooks, modes, and the modes of torch."""
    tensors = {key: value.clone() for key, value in [*model.named_parameters(), *model.named_buffers()]}
    parts = {
        (name, key): dict(value) if isinstance(value, dict) and key.startswith("_") else value
        for name, part in model.named_modules() for key, value in vars(part).items()
        if "hook" in key or key in ("training", "fused_attn", "forward")
    }  # fmt: skip
    gradients = {key: (p.requires_grad, p.grad) for key, p in model.named_parameters()}
    torchs = (
        torch.is_grad_enabled(),
        torch._C._len_torch_function_stack(),
        F.scaled_dot_product_attention,
        torch.softmax,
    )
    return {"tensors": tensors, "parts": parts, "gradients": gradients, "torch": torchs}


def assert_same(now: dict, before: dict) -> None:
    tensors = before["tensors"]
    assert now["tensors"].keys() == tensors.keys() and all(torch.equal(now["tensors"][k], tensors[k]) for k in tensors)
    assert {k: v for k, v in now.items() if k != "tensors"} == {k: v for k, v in before.items() if k != "tensors"}


def fail(attention, layer):
    raise ArithmeticError("from the measure")


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "written out"])
@pytest.mark.parametrize("where", ["nowhere", "measure", "model"])
@pytest.mark.parametrize("gradients", [True, False])
def test_model_comes_back(where, fused, gradients):
    model, x = odd(fused, fails=where == "model"), images(3, 16, 16)
    before = state(model)
    assert ("frozen", "training") in before["parts"] and before["parts"]["attn", "training"]
    assert not before["parts"]["frozen.0", "training"] and len(before["parts"]["", "_forward_hooks"]) == 1
    with torch.set_grad_enabled(gradients):
        inside = torch.is_grad_enabled(), torch._C._len_torch_function_stack()
        with (
            contextlib.nullcontext()
            if where == "nowhere"
            else pytest.raises(ArithmeticError, match=f"from the {where}")
        ):
            assert len(record(model, x, fail if where == "measure" else maps)) == 2
        assert inside == (torch.is_grad_enabled(), torch._C._len_torch_function_stack())
    assert_same(state(model), before)


def test_state_sees_what_a_recorder_could_leave():
    """The comparison above can fail: each of these would be noticed."""
    for spoil in (
        lambda m: m.frozen.train(),
        lambda m: m.attn.register_forward_hook(lambda *_: None, always_call=True),
        lambda m: m.norm.running_mean.add_(1),
        lambda m: m.frozen.requires_grad_(True),
        lambda m: setattr(m.attn, "fused_attn", False),
    ):
        model = odd()
        before = state(model)
        spoil(model)
        with pytest.raises(AssertionError):
            assert_same(state(model), before)


@pytest.mark.parametrize("make", [vit, lambda: vit(fused=False), odd, lambda: vit("beit_base_patch16_224"), whole])
def test_outputs_before_during_and_after_are_the_same(make):
    model = make().eval()
    x = images(3, *(model.patch_embed.img_size))
    outputs = []
    with torch.no_grad():
        outputs.append(model(x))
        handle = model.register_forward_hook(lambda _, inputs, output: outputs.append(output.clone()))
        record(model, x, maps)
        handle.remove()
        outputs.append(model(x))
    before, *_, during, after = outputs  # the passes of the experiment are seen by hooks, too
    assert torch.equal(during, before) and torch.equal(after, before)


def test_the_measure_runs_without_gradients_in_eval_mode():
    model = odd()
    seen = []

    def measure(attention, layer):
        seen.append((torch.is_grad_enabled(), attention.requires_grad, model.attn.training, model.norm.training))
        return {}

    record(model, images(3, 16, 16), measure)
    assert set(seen) == {(False, False, False, False)} and len(seen) == 2


def test_what_the_measure_computes_is_not_taken_for_the_models():
    """Attention, softmax and whole models inside a measure."""
    other = vit()

    def measure(attention, layer):
        F.scaled_dot_product_attention(attention, attention, attention)
        attention.softmax(-1) @ attention.mT
        return {"logits": other(images(len(attention)))}

    for model, size in ((vit(), 32), (whole(), 8)):
        plain = record(model, images(2, size, size), maps)
        recorded = record(model, images(2, size, size), measure)
        assert status(recorded) == status(plain) and all(item.layer.status == "ok" for item in recorded)


def test_compiled_models_are_measured_as_they_were():
    model = vit()
    expected = record(model, images(), maps)
    calls = []

    def backend(graph, inputs):
        calls.append(len(inputs))
        return graph.forward

    in_place = copy.deepcopy(model)
    in_place.blocks[0].compile(backend=backend)
    before = in_place.blocks[0]._compiled_call_impl
    for compiled in (torch.compile(model, backend=backend), in_place):
        for item, other in zip(record(compiled, images(), maps), expected, strict=True):
            assert item.layer == other.layer and torch.equal(item.values["map"], other.values["map"])
    assert not calls and in_place.blocks[0]._compiled_call_impl is before
    model.blocks[1] = torch.compile(model.blocks[1], backend=backend)
    names = [item.layer.name.replace("._orig_mod", "") for item in record(model, images(), maps)]
    assert names == [item.layer.name for item in expected] and not calls
    traced = torch.jit.trace(vit(), images())
    assert [item.layer.status for item in record(traced, images(), maps)] == ["ok"] * 2


def test_outputs_of_torchs_transformer_stay():
    """nn.MultiheadAttention leaves its fast path while it is watched; the result is the same to rounding."""
    model = torchvision.models.VisionTransformer(16, 8, 2, 2, 16, 16, num_classes=3).eval()
    nn.init.normal_(model.heads.head.weight)
    outputs = []
    with torch.no_grad():
        plain = model(images(2, 16, 16))
        model.register_forward_hook(lambda _, inputs, output: outputs.append(output))
        record(model, images(2, 16, 16), maps)
    assert plain.std() > 0.1
    torch.testing.assert_close(outputs[-1], plain, atol=1e-5, rtol=0)
