"""What can be measured of a model: every attention layer, how it is seen, and why one is skipped; and of many families."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from cil import checkpoint
from locality_probe.probe import NO_PATCHES
from locality_probe.record import Layer, watching
from locality_probe.subject import Subject, from_file, from_model_option, from_run
from locality_probe.typed import Typed, check_model

BATCH = 2  # of one image alone, windows could not be told from images


def examine(
    model: nn.Module, *inputs: object, grid: tuple[int, ...] | None = None, num_prefix_tokens: int | None = None
) -> list[Layer]:
    """Every attention layer of `model` as it runs on `inputs` ([2, ...] at least), measured or skipped with its reason.

    Raises ValueError for a model without attention or with compiled parts.
    """
    with watching(model, lambda layer, maps: {}, grid, num_prefix_tokens) as watch:
        watch.forward(*inputs)
    layers = [item.layer for item in watch.result()]
    return [x if x.status != "ok" or x.between_patches else x.skipped(NO_PATCHES) for x in layers]


def find(model: str, weights: Path | None = None, pretrained: bool = False) -> Subject:
    """A run directory (its last task), a weights file, or LIBRARY/NAME. Raises ValueError for anything else."""
    path = Path(model)
    if path.is_file() or path.is_dir():
        if weights or pretrained:
            raise Typed(f"{model} has its own weights: leave --weights and --pretrained away")
        directory = checkpoint.open_run(path) if path.is_dir() else None
        if directory and not directory.tasks:
            raise ValueError(f"{model} has no finished task yet")
        return from_run(directory, directory.tasks[-1]) if directory else from_file(path)
    check_model(model)
    return from_model_option(model, weights, pretrained, warn=lambda sentence: None)


def examine_subject(
    subject: Subject, grid: tuple[int, ...] | None = None, num_prefix_tokens: int | None = None, device: str = "cpu"
) -> list[Layer]:
    """`examine` on two images of noise, of the size that the subject's network takes."""
    noise = torch.randint(256, (300, 300, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x = subject.preprocess(Image.fromarray(noise.numpy()))
    model, pair = subject.model.to(device), torch.stack([x, x.flip(-1)]).to(device)
    return examine(model, pair, grid=grid, num_prefix_tokens=num_prefix_tokens)


def format_layers(layers: list[Layer]) -> str:
    """A line a layer, and how many can be measured."""
    rows = [("layer", "name", "kind", "how", "heads", "grid", "prefix", "status")]
    for x in layers:
        seen = x.status == "ok" or x.reason == NO_PATCHES
        grid = "x".join(map(str, x.grid)) + (" window" if x.extent == "window" else "") if seen else ""
        status = x.status if x.status == "ok" else f"skipped: {x.reason}"
        rows.append((str(x.index), x.name, x.kind, x.how, str(x.num_heads) if seen else "", grid,
                     str(x.num_prefix_tokens) if seen else "", status))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    lines = ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]]) for row in rows]
    return "\n".join([*lines, summary(layers)])


def summary(layers: list[Layer]) -> str:
    """How many layers can be measured, in a sentence."""
    ok = [x for x in layers if x.status == "ok"]
    windows = sum(x.extent == "window" for x in ok)
    inside = f" ({windows} of them inside their windows)" if windows else ""
    return f"{len(ok)} of {len(layers)} attention layers can be measured{inside}"


# Many families ---------------------------------------------------------------------------------------------------------

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
_TINY = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 64}
_IMAGE = _TINY | {"image_size": 64, "patch_size": 16}
HF = {  # name of the configuration and model in transformers -> settings of a small one
    "ViT": _IMAGE, "DeiT": _IMAGE, "Dinov2": _IMAGE | {"patch_size": 14, "image_size": 70},
    "Dinov2WithRegisters": _IMAGE | {"patch_size": 14, "image_size": 70}, "DINOv3ViT": _IMAGE, "Beit": _IMAGE,
    "CLIPVision": _IMAGE, "SiglipVision": _IMAGE, "ViTMSN": _IMAGE, "Data2VecVision": _IMAGE,
    "Yolos": _IMAGE | {"image_size": [64, 64]},
    "Swin": {"image_size": 112, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 2]},
    "PvtV2": {"image_size": 64, "depths": [1, 1, 1, 1]}, "Segformer": {"depths": [1, 1, 1, 1]},
    "GPT2": {"n_embd": 48, "n_layer": 2, "n_head": 3}, "Llama": _TINY | {"num_key_value_heads": 1},
    "Bert": _TINY,
}  # fmt: skip
TEXT = 24  # tokens of a text
FAMILIES = len(TIMM) + len(TORCHVISION) + len(HF)


def families() -> Iterator[tuple[str, str, str, Callable[[], list[Layer]]]]:
    """(library, family, model, its layers when called), random weights, the whole network on two random inputs."""
    import timm
    import torchvision

    def timm_layers(name: str) -> list[Layer]:
        model = timm.create_model(name, num_classes=3)
        size = timm.data.resolve_model_data_config(model)["input_size"]
        return examine(model, torch.randn(BATCH, *size))

    for family, name in TIMM.items():
        yield "timm", family, name, lambda name=name: timm_layers(name)
    for family, name in TORCHVISION.items():
        yield (
            "torchvision",
            family,
            name,
            lambda name=name: examine(
                torchvision.models.get_model(name, num_classes=3), torch.randn(BATCH, 3, 224, 224)
            ),
        )
    with contextlib.suppress(ImportError):
        import transformers

        def hf_layers(name: str, settings: dict) -> list[Layer]:
            config = getattr(transformers, f"{name}Config")(**settings)
            model = getattr(transformers, f"{name}Model")(config)
            if model.main_input_name == "input_ids":
                return examine(model, torch.randint(100, (BATCH, TEXT)), grid=(TEXT,))
            size = getattr(config, "image_size", 64)
            return examine(model, torch.randn(BATCH, 3, *([size] * 2 if isinstance(size, int) else size)))

        for name, settings in HF.items():
            yield "transformers", name, f"{name}Model", lambda name=name, s=settings: hf_layers(name, s)


def support_matrix(report: Callable[[str], None] = lambda family: None) -> str:
    """docs/support.md: what becomes of each attention layer of each family, as Markdown."""
    from cil.files import versions

    rows, counts = [], {"families": 0, "layers": 0, "ok": 0, "window": 0, "skipped": 0}
    for library, family, name, layers_of in families():
        try:
            torch.manual_seed(0)
            layers = layers_of()
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

`+ n` are prefix tokens (class, distillation, registers). How: *fused* is `scaled_dot_product_attention`, *multihead*
`nn.MultiheadAttention`, *written out* a softmax that is multiplied with the values, *asked* a layer that gives its map.

| library | family | model | measured | grids | how | skipped |
|---|---|---|---|---|---|---|
"""
    return head + "\n".join(rows) + "\n"


def _grid(layer: Layer) -> str:
    grid = "x".join(map(str, layer.grid)) + (f" + {layer.num_prefix_tokens}" if layer.num_prefix_tokens else "")
    return grid + (" (window)" if layer.extent == "window" else " (causal)" if layer.causal else "")
