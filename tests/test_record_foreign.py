"""Other people's networks: kernels of other libraries, prompts, towers, decoders, and what a Probe must leave alone."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from networks import images, sharpen, vit
from torch import nn

from locality_probe import Probe, examine
from locality_probe.measures import nonlocality
from locality_probe.record import record

pytestmark = pytest.mark.usefixtures("seeded")
sdpa = F.scaled_dot_product_attention


@torch.library.custom_op("locality_probe_test::tokens_first", mutates_args=())
def tokens_first(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """[B, N, H, d], as flash-attn and xformers have it."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return ((q @ k.mT * scale).softmax(-1) @ v).transpose(1, 2).contiguous()


@torch.library.custom_op("locality_probe_test::heads_first", mutates_args=())
def heads_first(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
    """[B, H, N, d], with something besides the output."""
    return [(q @ k.mT).softmax(-1) @ v, q.sum(-1)]


@torch.library.custom_op("locality_probe_test::no_attention", mutates_args=())
def no_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return q * k.mean(-2, keepdim=True) + v


@torch.jit.script
def scripted(q, k, v):
    return torch.softmax(torch.matmul(q, k.transpose(-2, -1)), -1) @ v


def flex(q, k, v):
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(q, k, v, scale=1.0)


KERNELS = {  # of q, k, v [B, H, N, d], scale 1
    "tokens first": lambda q, k, v: tokens_first(*(x.transpose(1, 2) for x in (q, k, v)), 1.0).transpose(1, 2),
    "heads first": lambda q, k, v: heads_first(q, k, v)[0],
    "scripted": scripted,
    "flex_attention": flex,
    "by its name in aten": lambda q, k, v: torch.ops.aten.scaled_dot_product_attention(q, k, v, scale=1.0),
    "by its kernel": lambda q, k, v: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=1.0)[0],
    "torch._softmax": lambda q, k, v: torch._softmax(q @ k.mT, -1, False) @ v,
}


class Layer(nn.Module):
    def __init__(self, attend, dim=32):
        super().__init__()
        self.attend, self.qkv = attend, nn.Linear(dim, 3 * dim)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2).contiguous() for y in self.qkv(x).chunk(3, -1))
        return x + self.attend(q, k, v).transpose(1, 2).flatten(2)


class Around(nn.Module):
    """4 x 4 patches, `front` tokens before and `behind` tokens after them, and layers."""

    def __init__(self, *attends, front=0, behind=0, dim=32):
        super().__init__()
        self.patch, self.layers = nn.Conv2d(3, dim, 8, 8), nn.Sequential(*(Layer(attend, dim) for attend in attends))
        self.front, self.behind = (nn.Parameter(torch.randn(1, n, dim)) for n in (front, behind))

    def forward(self, x):
        x = self.patch(x).flatten(2).mT
        front, behind = (extra.expand(len(x), -1, -1) for extra in (self.front, self.behind))
        return self.layers(torch.cat([front, x, behind], 1))


@pytest.mark.parametrize("case", KERNELS)
def test_every_kernel_is_read_as_the_same_attention(case):
    model = Around(sdpa, KERNELS[case], front=1).eval()
    with torch.no_grad():
        plain = model(images())
        tokens = torch.cat([model.front.expand(3, -1, -1), model.patch(images()).flatten(2).mT], 1)
        qkv = model.layers[1].qkv(model.layers[0](tokens))
        q, k, _ = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in qkv.chunk(3, -1))
    with Probe(model) as probe:
        torch.testing.assert_close(probe.update(images()), plain, atol=1e-5, rtol=1e-5)
    found = probe.result()
    assert [(layer.status, layer.grid, layer.num_prefix_tokens) for layer in found.layers] == [("ok", (4, 4), 1)] * 2
    expected = nonlocality((q.double() @ k.double().mT).softmax(-1), (4, 4), 1)[0]
    torch.testing.assert_close(found.values[1]["d_loc"], expected, rtol=1e-5, atol=1e-6)


def test_an_operator_that_is_no_attention_is_a_row_that_says_what_to_do():
    first, second = record(Around(sdpa, no_attention), images(), lambda a, layer: {})
    assert first.layer.status == "ok" and second.layer.name == "layers.1"
    assert second.layer.reason.startswith("unseen kernel locality_probe_test.no_attention")
    assert "attn_implementation='sdpa'" in second.layer.reason


def test_prompts_behind_the_patches_are_no_patches():
    """As visual prompt tuning has them, and YOLOS its detection tokens: seventeen of them fill another grid by chance."""
    for front, behind in ((1, 5), (0, 9), (1, 8)):
        model = Around(sdpa, front=front, behind=behind).eval()
        (item,) = record(model, images(), lambda a, layer: {"map": a})
        assert (item.layer.status, item.layer.grid, item.layer.num_prefix_tokens) == ("ok", (4, 4), front + behind)
        patches = item.values["map"][:, :, front : front + 16, front : front + 16]
        with Probe(model) as probe:
            probe.update(images())
        torch.testing.assert_close(
            probe.result().values[0]["d_loc"], nonlocality(patches, (4, 4))[0], rtol=1e-5, atol=1e-6
        )


def test_prompts_in_front_of_keys_alone_are_prefix_mass():
    """Prefix tuning (DualPrompt, CODA-Prompt): 5 keys and values more than queries."""
    prompt = torch.randn(2, 2, 5, 16)

    def prompted(q, k, v):
        keys, values = (torch.cat([p.expand(len(q), -1, -1, -1), x], 2) for p, x in zip(prompt, (k, v), strict=True))
        return sdpa(q, keys, values)

    with Probe(Around(prompted)) as probe:
        probe.update(images())
    found = probe.result()
    assert (found.layers[0].queries, found.layers[0].keys, found.layers[0].num_prefix_tokens) == (16, 21, 5)
    assert (found.values[0]["prefix_mass"] > 0.05).all()


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.visual, self.embed, self.text = Around(sdpa), nn.Embedding(50, 32), Layer(sdpa)

    def forward(self, pixels, ids):
        return self.visual(pixels).mean() + self.text(self.embed(ids)).mean()


def test_words_are_not_on_the_images_grid():
    ids = torch.randint(50, (3, 16))  # as many words as patches
    text, visual = examine(Towers(), images(), ids)
    assert text.name == "text" or visual.name == "text"
    by_name = {layer.name: layer for layer in (text, visual)}
    assert by_name["visual.layers.0"].grid == (4, 4) and by_name["text"].reason.startswith(
        "none of its keys is a place"
    )
    both = {layer.name: layer for layer in examine(Towers(), images(), ids, grid={"text": (16,)})}
    assert (both["text"].grid, both["text"].places) == ((16,), "given")
    assert (both["visual.layers.0"].grid, both["visual.layers.0"].places) == ((4, 4), "observed")


class Decoder(nn.Module):
    """As many object queries as patches (DETR)."""

    def __init__(self):
        super().__init__()
        self.patch, self.query = nn.Conv2d(3, 8, 8, 8), nn.Embedding(16, 8)
        self.encoder, self.own, self.cross = (nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(3))

    def forward(self, x):
        t = self.patch(x).flatten(2).mT
        t = t + self.encoder(t, t, t, need_weights=False)[0]
        q = self.query.weight.expand(len(x), -1, -1)
        q = q + self.own(q, q, q)[0]
        return self.cross(q, t, t)[0]


def test_object_queries_have_no_place():
    layers = {layer.name: (layer.status, layer.reason[:28]) for layer in examine(Decoder(), images())}
    assert layers == {
        "encoder": ("ok", ""),
        "own": ("skipped", "none of its keys is a place "),
        "cross": ("skipped", "only class or task tokens ar"),
    }


class Shuffled(Around):
    def forward(self, x, noise=None):
        t = self.patch(x).flatten(2).mT
        order = (torch.rand(len(x), 16) if noise is None else noise).argsort(1)
        return self.layers(t.gather(1, order[..., None].expand_as(t)))


def test_tokens_that_are_shuffled_are_refused_or_found():
    """MAE: at random in each pass, by a noise that differs from image to image, and by one that is the same for all."""
    (layer,) = examine(Shuffled(sdpa), images())
    assert layer.reason.startswith("its tokens are at other places")
    (layer,) = examine(Shuffled(sdpa), images(), torch.rand(3, 16))
    assert layer.status == "skipped"
    (layer,) = examine(Shuffled(sdpa), images(), torch.rand(1, 16).expand(3, -1))
    assert (layer.status, layer.grid) == ("ok", (4, 4))


def test_a_model_that_takes_one_number_of_images_is_observed_a_few_at_a_time():
    def fixed(q, k, v):
        return sdpa(*(x.reshape(6, 16, 16) for x in (q, k, v))).reshape(3, 2, 16, 16)

    (layer,) = examine(Around(fixed), images(3))
    assert (layer.status, layer.grid, layer.num_heads) == ("ok", (4, 4), 2)


class Merging(nn.Linear):
    """As LoRA layers that merge their weights in eval()."""

    def train(self, mode=True):
        self.weight.data += 0.0 if mode else 1.0
        return super().train(mode)


def test_the_model_is_nobodys_but_the_users_between_updates():
    model = vit()
    model.head = Merging(32, 3)
    before = copy.deepcopy(model.state_dict())
    generator = torch.random.get_rng_state()
    with Probe(model) as probe, Probe(model) as other:
        probe.update(images())
        copy.deepcopy(model)
        torch.save(model, io.BytesIO())
        model(images())
        other.update(images())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), generator)
    for a, b in zip(probe.result().values, other.result().values, strict=True):
        assert torch.equal(a["d_loc"], b["d_loc"])


def test_a_gate_that_is_not_gpsas_is_not_shown():
    model = Around(sdpa)
    model.layers[0].gate = nn.Parameter(torch.zeros(2))
    with Probe(model) as probe:
        probe.update(images())
    assert probe.result().table()["gate"].isna().all()


def test_what_is_cached_outlives_meta_tensors_and_inference_mode():
    model = sharpen(vit())
    with torch.inference_mode(), torch.device("meta"):
        from locality_probe import geometry

        geometry.positions.cache_clear()
        geometry.distances.cache_clear()
        assert geometry.positions((4, 4)).device.type == "cpu" and not geometry.distances((4, 4)).is_inference()
    with Probe(model) as probe:
        probe.update(images())
    assert probe.result().values[0]["d_loc"].isfinite().all()
