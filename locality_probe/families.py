"""What can be measured of many families of models: the table of docs/support.md, made by running a small member of each."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from locality_probe.doctor import BATCH, examine
from locality_probe.record import Layer

# A small member of each family of timm that has attention, and its settings where the plain one is large.
TIMM = {
    "BAT-ResNeXt": "bat_resnext26ts", "BEiT": "beit_base_patch16_224", "BEiT v2": "beitv2_base_patch16_224",
    "BoTNet": "botnet26t_256", "CaFormer": "caformer_s18", "CaiT": "cait_xxs24_224", "CoaT": "coat_tiny",
    "CoaT-Lite": "coat_lite_tiny", "CoAtNet": "coatnet_0_rw_224", "ConViT": "convit_tiny", "CrossViT": "crossvit_tiny_240",
    "DaViT": "davit_tiny", "DeiT": "deit_tiny_patch16_224", "DeiT distilled": "deit_tiny_distilled_patch16_224",
    "DeiT-III": "deit3_small_patch16_224", "DINOv2": "vit_small_patch14_dinov2",
    "DINOv2, registers": "vit_small_patch14_reg4_dinov2", "DINOv3": "vit_small_patch16_dinov3",
    "EdgeNeXt": "edgenext_xx_small", "EfficientFormer": "efficientformer_l1", "EfficientFormerV2": "efficientformerv2_s0",
    "EfficientViT (MIT)": "efficientvit_b0", "EfficientViT (MSRA)": "efficientvit_m0", "EVA": "eva_large_patch14_196",
    "EVA-02": "eva02_tiny_patch14_224", "FastViT": "fastvit_sa12", "FlexiViT": "flexivit_small",
    "FocalNet": "focalnet_tiny_srf", "GC-ViT": "gcvit_xxtiny", "HaloNet": "halonet26t", "Hiera": "hiera_tiny_224",
    "Hiera (SAM 2)": "sam2_hiera_tiny", "NextViT": "nextvit_small", "LambdaNet": "lambda_resnet26rpt_256",
    "LeViT": "levit_128s", "MaxViT": "maxvit_rmlp_pico_rw_256", "MaxxViT": "maxxvit_rmlp_nano_rw_256",
    "MobileNetV4 hybrid": "mobilenetv4_hybrid_medium", "MobileViT": "mobilevit_xxs", "MobileViTv2": "mobilevitv2_050",
    "MViTv2": "mvitv2_tiny", "NaFlexViT": "naflexvit_base_patch16_gap", "NesT": "nest_tiny", "PiT": "pit_ti_224",
    "PVTv2": "pvt_v2_b0", "ResNet": "resnet18", "SAM": "samvit_base_patch16_224",
    "SigLIP": "vit_base_patch16_siglip_224", "SHViT": "shvit_s1", "SwiftFormer": "swiftformer_xs",
    "Swin": "swin_tiny_patch4_window7_224", "Swin V2": "swinv2_tiny_window8_256", "Swin V2-CR": "swinv2_cr_tiny_ns_224",
    "Swin-S3": "swin_s3_tiny_224", "TinyViT": "tiny_vit_5m_224", "TNT": "tnt_s_legacy_patch16_224",
    "Twins-PCPVT": "twins_pcpvt_small",
    "Twins-SVT": "twins_svt_small", "ViT": "vit_tiny_patch16_224", "ViT, hybrid": "vit_tiny_r_s16_p8_224",
    "ViT, parallel": "vit_small_patch16_18x2_224", "ViT, registers": "vit_medium_patch16_reg4_gap_256",
    "ViT, relative position": "vit_relpos_small_patch16_224", "ViT, rotary": "vit_small_patch16_rope_224",
    "ViT, differential": "vit_dwee_patch16_reg1_gap_256", "ViT, shape-optimised": "vit_so150m_patch16_reg4_gap_256",
    "ViTamin": "vitamin_small_224", "Visformer": "visformer_tiny", "VOLO": "volo_d1_224", "XCiT": "xcit_nano_12_p16_224",
}  # fmt: skip
TORCHVISION = {"ViT": "vit_b_16", "Swin": "swin_t", "Swin V2": "swin_v2_t", "MaxViT": "maxvit_t"}
_TINY: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 64}
_IMAGE = _TINY | {"image_size": 64, "patch_size": 16}
HF: dict[str, dict[str, Any]] = {  # name of the configuration and model in transformers -> settings of a small one
    "ViT": _IMAGE, "DeiT": _IMAGE, "Dinov2": _IMAGE | {"patch_size": 14, "image_size": 70},
    "Dinov2WithRegisters": _IMAGE | {"patch_size": 14, "image_size": 70}, "DINOv3ViT": _IMAGE, "Beit": _IMAGE,
    "CLIPVision": _IMAGE, "SiglipVision": _IMAGE, "ViTMSN": _IMAGE, "Data2VecVision": _IMAGE,
    "Yolos": _IMAGE | {"image_size": [64, 64]},
    "Swin": {"image_size": 112, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 2]},
    "PvtV2": {"image_size": 64, "depths": [1, 1, 1, 1]}, "Segformer": {"depths": [1, 1, 1, 1]},
    "ViTMAE": _IMAGE | {"mask_ratio": 0.0},
    "SamVision": {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "mlp_dim": 64, "image_size": 96,
                  "patch_size": 16, "window_size": 4, "global_attn_indexes": [1], "output_channels": 16},
    "Detr": {"use_timm_backbone": True, "use_pretrained_backbone": False, "backbone": "resnet18", "d_model": 48,
             "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
             "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_queries": 9},
    "CLIP": {"vision_config": _IMAGE, "text_config": _TINY | {"num_hidden_layers": 1}},
    "MllamaVision": {"hidden_size": 48, "num_hidden_layers": 1, "num_global_layers": 1, "attention_heads": 3,
                     "intermediate_size": 96, "image_size": 32, "patch_size": 8, "max_num_tiles": 4,
                     "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1], [2, 2]]},
    "Qwen2VLVision": {"depth": 2, "embed_dim": 48, "num_heads": 3, "hidden_size": 64, "mlp_ratio": 2},
    "Siglip2Vision": _TINY | {"num_patches": 16, "patch_size": 16},
    "VideoMAE": _IMAGE | {"num_frames": 4}, "Timesformer": _IMAGE | {"num_frames": 4},
    "VJEPA2": {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "crop_size": 64, "patch_size": 16,
               "frames_per_clip": 4, "pred_hidden_size": 24, "pred_num_hidden_layers": 1, "pred_num_attention_heads": 2},
    "GPT2": {"n_embd": 48, "n_layer": 2, "n_head": 3}, "Llama": _TINY | {"num_key_value_heads": 1},
    "Bert": _TINY,
}  # fmt: skip
VIDEOS = {"VideoMAE": (2, 4, 4), "Timesformer": (4, 4, 4), "VJEPA2": (2, 4, 4)}  # frames (or pairs), rows, columns
TEXT = 24  # tokens of a text
TEXTS = ("GPT2", "Llama", "Bert")
GIVEN: dict[str, Any] = {  # grids of what is no image
    **VIDEOS, **dict.fromkeys(TEXTS, (TEXT,)), "CLIP": {"text_model": (TEXT,)},
}  # fmt: skip
FAMILIES = len(TIMM) + len(TORCHVISION) + len(HF)


@dataclass(frozen=True)
class Member:
    """A small network of a family. make: it, with random weights, and the inputs that it takes, by position and by name."""

    library: str
    family: str
    name: str
    make: Callable[[], tuple[nn.Module, tuple, dict[str, Any]]]
    grid: tuple[int, ...] | dict[str, tuple[int, ...]] | None = None  # of what is no image

    def layers(self) -> list[Layer]:
        """Its attention layers on two random inputs. Raises ValueError where it has none."""
        torch.manual_seed(0)
        model, inputs, named = self.make()
        return examine(model, *inputs, grid=self.grid, **named)


def families() -> Iterator[Member]:
    """A member of each family; those of transformers only where it is installed."""
    import timm
    import torchvision

    def of_timm(name: str) -> tuple[nn.Module, tuple, dict[str, Any]]:
        model = timm.create_model(name, num_classes=3)
        return model, (torch.randn(BATCH, *timm.data.resolve_model_data_config(model)["input_size"]),), {}

    for family, name in TIMM.items():
        yield Member("timm", family, name, functools.partial(of_timm, name))

    def of_torchvision(name: str) -> tuple[nn.Module, tuple, dict[str, Any]]:
        return torchvision.models.get_model(name, num_classes=3), (torch.randn(BATCH, 3, 224, 224),), {}

    for family, name in TORCHVISION.items():
        yield Member("torchvision", family, name, functools.partial(of_torchvision, name))
    with contextlib.suppress(ImportError):
        import transformers  # noqa: F401

        for name, settings in HF.items():
            make = functools.partial(_of_transformers, name, settings)
            yield Member("transformers", name, f"{name}Model", make, GIVEN.get(name))


def _of_transformers(name: str, settings: dict[str, Any]) -> tuple[nn.Module, tuple, dict[str, Any]]:
    import transformers

    if name == "Qwen2VLVision":  # patches of one image after another, and the frames, rows and columns of each
        from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen
        from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig

        tower = qwen.Qwen2VisionTransformerPretrainedModel(Qwen2VLVisionConfig(**settings))
        return tower, (torch.randn(32 + 24, 3 * 2 * 14 * 14),), {"grid_thw": torch.tensor([[1, 4, 8], [1, 6, 4]])}
    config = getattr(transformers, f"{name}Config")(**settings)
    model = getattr(transformers, f"{name}Model")(config)
    named: dict[str, Any] = {}
    if name in TEXTS:
        return model, (torch.randint(100, (BATCH, TEXT)),), named
    if name == "CLIP":
        named = {"input_ids": torch.randint(100, (BATCH, TEXT)), "pixel_values": torch.randn(BATCH, 3, 64, 64)}
        return model, (), named
    if name == "Siglip2Vision":  # patches, and how many rows and columns each image has of them
        named = {"pixel_values": torch.randn(BATCH, 16, 768), "pixel_attention_mask": torch.ones(BATCH, 16).long()}
        return model, (), named | {"spatial_shapes": torch.full((BATCH, 2), 4)}
    if name == "MllamaVision":  # tiles of an image: [B, images, tiles, 3, H, W]
        named = {"aspect_ratio_ids": torch.full((BATCH, 1), 4), "aspect_ratio_mask": torch.ones(BATCH, 1, 4).long()}
        return model, (torch.randn(BATCH, 1, 4, 3, 32, 32),), named
    if name in VIDEOS:
        return model, (torch.randn(BATCH, 4, 3, 64, 64),), named
    size = getattr(config, "image_size", 64)
    return model, (torch.randn(BATCH, 3, *([size] * 2 if isinstance(size, int) else size)),), named


def support_matrix(report: Callable[[str], None] = lambda family: None) -> str:
    """docs/support.md: what becomes of each attention layer of each family, as Markdown."""
    from cil.files import versions

    rows, counts = [], {"families": 0, "layers": 0, "ok": 0, "window": 0, "skipped": 0}
    for member in families():
        library, family, name = member.library, member.family, member.name
        try:
            layers = member.layers()
        except ValueError as error:  # no attention: refused in a sentence
            rows.append(f"| {library} | {family} | `{name}` | refused | | | {error} |")
            counts["families"] += 1
            report(family)
            continue
        ok = [x for x in layers if x.status == "ok"]
        groups: dict[str, int] = {}
        for x in layers:
            if x.status != "ok":
                reason = f"{x.kind}: {x.reason}"
                groups[reason] = groups.get(reason, 0) + 1
        grids = dict.fromkeys(_grid(x) for x in ok)
        why = "; ".join(f"{n} {reason}" for reason, n in groups.items())
        rows.append(f"| {library} | {family} | `{name}` | {len(ok)} of {len(layers)} | {', '.join(grids)} "
                    f"| {', '.join(dict.fromkeys(x.how for x in ok))} | {why} |")  # fmt: skip
        windows = sum(x.extent == "window" for x in ok)
        for key, n in zip(counts, (1, len(layers), len(ok) - windows, windows, len(layers) - len(ok)), strict=True):
            counts[key] += n
        report(family)
    known = ", ".join(
        f"{name} {version}" for name, version in versions().items() if name in ("torch", "timm", "torchvision")
    )
    head = f"""# What can be measured

Written by `locality-probe doctor --families > docs/support.md` ({known}): a small member of each family,
random weights, its whole forward pass on two inputs. Every attention layer is either measured or skipped with the reason;
none is missing.

{counts["families"]} families with {counts["layers"]} attention layers: {counts["ok"]} measured over the whole image or
sequence, {counts["window"]} inside their windows, {counts["skipped"]} skipped.

`+ n` are keys without a place in the image (class, register and detection tokens, prompts). Where keys are pooled, the
grid is that of the queries. How: *sdpa* is a kernel of `scaled_dot_product_attention`, *eager* products of queries, keys
and values, *kernel* another library's kernel, *asked* a layer that gives its map. Where
tokens are is observed, but for sequences and videos, whose grid is given.

| library | family | model | measured | grids | how | skipped |
|---|---|---|---|---|---|---|
"""
    return head + "\n".join(rows) + "\n"


def _grid(layer: Layer) -> str:
    grid = "x".join(map(str, layer.grid)) + (f" + {layer.num_prefix_tokens}" if layer.num_prefix_tokens else "")
    return grid + (" (window)" if layer.extent == "window" else " (causal)" if layer.causal else "")
