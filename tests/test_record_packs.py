"""Images that come as packed patches: where their tokens are is observed along the grids that come with them."""

import pytest
import timm
import torch

from locality_probe.probe import Probe

transformers = pytest.importorskip("transformers")
TINY = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 64}


def siglip2():
    config = transformers.Siglip2VisionConfig(**TINY, num_patches=16, patch_size=16)
    torch.manual_seed(0)
    return transformers.Siglip2VisionModel(config).eval()


def padded(*shapes, longest=16):
    mask = torch.zeros(len(shapes), longest).long()
    for row, (rows, columns) in zip(mask, shapes, strict=True):
        row[: rows * columns] = 1
    pixels = torch.randn(len(shapes), longest, 768, generator=torch.Generator().manual_seed(1))
    return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": torch.tensor(shapes)}


def measured(model, *inputs, grid=None, **named):
    with Probe(model, grid=grid) as probe:
        probe.update(*inputs, **named)
    return probe.result()


def test_padding_is_no_patch():
    result = measured(siglip2(), **padded((3, 4), (3, 4)))
    layers = [layer for layer in result.layers if layer.status == "ok"]
    assert [(layer.grid, layer.places, layer.num_prefix_tokens) for layer in layers] == [((3, 4), "observed", 4)] * 2
    alone = measured(siglip2(), **padded((3, 4), (3, 4), longest=12) | {
        "pixel_values": padded((3, 4), (3, 4))["pixel_values"][:, :12]
    })  # fmt: skip
    for one, other in zip(result.values[:2], alone.values[:2], strict=True):
        torch.testing.assert_close(one["d_loc"], other["d_loc"], rtol=1e-5, atol=0)


def test_a_given_grid_that_is_not_the_inputs_is_refused():
    layers = measured(siglip2(), **padded((2, 8), (2, 8)), grid=(4, 4)).layers
    assert all("4 x 4 is given" in x.reason and "2 x 8 patches are observed" in x.reason for x in layers[:2])


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (padded((2, 8), (4, 3)), "spatial_shapes holds images of several grids"),
        (
            padded((2, 8), (2, 8)) | {"spatial_shapes": torch.tensor([[5, 8]] * 2)},
            "an image of 5 x 8 patches",
        ),
    ],
)
def test_grids_that_do_not_fit_are_refused(inputs, words):
    with pytest.raises(ValueError, match=words):
        measured(siglip2(), **inputs)


def test_naflex_dictionaries():
    torch.manual_seed(0)
    model = timm.create_model("naflexvit_base_patch16_gap", depth=2, embed_dim=48, num_heads=3, num_classes=3).eval()
    image = torch.randn(2, 3, 48, 64)
    patches = image.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
    coordinates = torch.cartesian_prod(torch.arange(3), torch.arange(4)).expand(2, 12, 2)
    packed = {"patches": patches, "patch_coord": coordinates, "patch_valid": torch.ones(2, 12).bool()}
    result = measured(model, packed)
    assert [(layer.grid, layer.num_prefix_tokens) for layer in result.layers] == [((3, 4), 4)] * 2
    # In another order of its patches the same image has the same D_loc.
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    mixed = {name: x[:, order] for name, x in packed.items()}
    for one, other in zip(result.values, measured(model, mixed).values, strict=True):
        torch.testing.assert_close(one["d_loc"], other["d_loc"], rtol=1e-4, atol=0)


def test_rows_of_each_image_of_a_pack_and_a_count_that_is_wrong():
    qwen = pytest.importorskip("transformers.models.qwen2_vl.modeling_qwen2_vl")
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig

    settings = {"depth": 1, "embed_dim": 48, "num_heads": 3, "hidden_size": 64, "mlp_ratio": 2}
    torch.manual_seed(0)
    model = qwen.Qwen2VisionTransformerPretrainedModel(Qwen2VLVisionConfig(**settings)).eval()
    x = torch.randn(56, 1176)
    both = measured(model, x, grid_thw=torch.tensor([[1, 4, 8], [1, 6, 4]]))
    assert [(layer.name, layer.grid) for layer in both.layers] == [
        ("blocks.0.attn", (4, 8)),
        ("blocks.0.attn#2", (6, 4)),
    ]
    second = measured(model, x[32:], grid_thw=torch.tensor([[1, 6, 4]]))
    torch.testing.assert_close(both.values[1]["d_loc"], second.values[0]["d_loc"], rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="grid_thw is of 32 patches, and there are 56"):
        measured(model, x, grid_thw=torch.tensor([[1, 4, 8]]))
