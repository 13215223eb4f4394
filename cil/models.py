"""The networks: the paper's (patch embedding, self-attention blocks, one task-attention block) and timm's; growing heads."""

from __future__ import annotations

import difflib
from typing import Any, cast

import timm
import timm.layers
import timm.models
import torch
import torch.nn.functional as F
from timm.layers import Mlp, PatchEmbed
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn

from cil.attention import ATTENTION, LocalizedAttention, TaskAttention, localize
from cil.methods import METHODS
from cil.run import Run


class DropPath(nn.Module):
    """Stochastic depth: in training, a row of the batch is dropped with probability p, and the others grow by 1 / (1 - p).

    Which rows are dropped is drawn by cil.draws for all calls of a step and laid into `kept`; in a training loop that does
    not do so, each call draws from torch's generator.
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p
        self.kept: list[Tensor] = []  # of the calls to come: 0 or 1 / (1 - p), float32
        self.calls: list[tuple[DropPath, tuple[int, ...]]] | None = None  # where `drop_path_calls` listens

    def forward(self, x: Tensor, per: int = 1) -> Tensor:
        """x of any shape; drawn separately for each index of its first `per` dimensions, the first being the batch."""
        if self.calls is not None:
            self.calls.append((self, tuple(x.shape[:per])))
        if not self.training or not self.p:
            return x
        kept = self.kept.pop(0) if self.kept else torch.empty(x.shape[:per]).bernoulli_(1 - self.p) / (1 - self.p)
        return x * kept.to(x).view(*kept.shape, *[1] * (x.dim() - per))


class Block(nn.Module):
    """Self-attention block, pre-norm: x + attn(norm1(x)), x + mlp(norm2(x)); [B, N, dim] -> [B, N, dim]."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class TaskBlock(Block):
    """Task-attention block: tokens [B, T, dim] look at themselves and the patches [B, N, dim]; residual on the tokens."""

    def forward(self, tokens: Tensor, patches: Tensor) -> Tensor:  # type: ignore[override]  # it reads two kinds of tokens
        # Stochastic depth is drawn separately for each token, as in DyTox.
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens), self.norm1(patches)), per=2)
        return tokens + self.drop_path(self.mlp(self.norm2(tokens)), per=2)


class Head(nn.Sequential):
    """LayerNorm + Linear: [..., dim] -> [..., classes]"""

    def __init__(self, dim: int, num_classes: int, init_std: float):
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(dim), nn.Linear(dim, num_classes)
        init_weights(self, init_std)


class Incremental(nn.Module):
    """What the trainer asks of a network; each kind says how to `grow` and what `forward_features` are.

    Images [B, 3, H, W] -> forward_features: what the heads read, [B, T, dim] -> forward_head: logits [B, classes seen].
    """

    token_per_task = False
    div_head: Head | None = None
    kept: frozenset[str] = frozenset()  # names of parameters that are never trained

    def __init__(self, run: Run):
        super().__init__()
        self.init_std = run.init_std
        self.heads = nn.ModuleList()  # one per task

    def grow(self, num_classes: int, divergence: bool = False) -> None:
        """Add a task of `num_classes` classes; with `divergence` a new divergence head, where the kind has one."""
        raise NotImplementedError

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """For an optimiser; biases and scales do not decay. lr_scale: of a group's learning rate, 1 where it is not there."""
        return param_groups_weight_decay(self, weight_decay)

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> what the heads read, [B, T, dim]"""
        raise NotImplementedError

    def forward_head(self, features: Tensor) -> Tensor:
        """[B, T, dim] -> logits [B, classes seen]: head t reads token t, or all heads the one class token"""
        return torch.cat([head(features[:, t if self.token_per_task else 0]) for t, head in enumerate(self.heads)], 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class IncrementalViT(Incremental):
    """ConViT-like network of the paper's baseline and of DyTox: heads read class or task tokens, [B, T, dim]."""

    def __init__(self, run: Run, image_size: tuple[int, int]):
        super().__init__(run)
        if any(side % run.patch_size for side in image_size):
            raise ValueError(f"patch_size={run.patch_size} does not divide the image size {image_size}")
        self.token_per_task = METHODS[run.method].token_per_task
        self.patch_embed = PatchEmbed(image_size, run.patch_size, 3, run.dim)
        self.grid = self.patch_embed.grid_size
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1], run.dim))
        drop_path = torch.linspace(0, run.drop_path, run.depth).tolist()
        self.blocks = nn.ModuleList(
            Block(run.dim, self_attention(run, index, self.grid), run.mlp_ratio, drop_path[index])
            for index in range(run.depth - 1)
        )
        self.task_block = TaskBlock(
            run.dim, TaskAttention(run.dim, run.num_heads, self.grid), run.mlp_ratio, drop_path[-1]
        )
        self.tokens = nn.ParameterList()  # one class token, or one token per task: [1, 1, dim] each
        self.div_head = None
        init_weights(self, run.init_std)
        nn.init.trunc_normal_(self.pos_embed, std=run.init_std)
        for attn in (block.get_submodule("attn") for block in self.blocks):
            if hasattr(attn, "pos_weight"):  # local attention starts with local values
                nn.init.eye_(attn.get_parameter("v.weight"))

    def grow(self, num_classes: int, divergence: bool = False) -> None:
        """Add a task of `num_classes` classes: a head, a token where the method has one per task, a new divergence head."""
        dim = self.pos_embed.shape[-1]
        device = self.pos_embed.device
        if self.token_per_task or not self.tokens:
            token = nn.init.trunc_normal_(torch.zeros(1, 1, dim), std=self.init_std)
            self.tokens.append(nn.Parameter(token.to(device)))
        self.heads.append(Head(dim, num_classes, self.init_std).to(device))
        self.div_head = Head(dim, num_classes + 1, self.init_std).to(device) if divergence else None

    def forward_patches(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, N, dim]"""
        x = self.patch_embed(x) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> the tokens that the heads read, [B, T, dim]"""
        patches = self.forward_patches(x)
        return self.task_block(torch.cat(list(self.tokens), dim=1).expand(len(x), -1, -1), patches)


class IncrementalTimm(Incremental):
    """A timm model as `backbone`, of the run's image and patch size: heads read its pooled features, [B, 1, dim].

    Images are scaled to input_size, bicubic, where the run has one.
    """

    def __init__(self, run: Run, image_size: tuple[int, int]):
        super().__init__(run)
        self.layer_decay = run.layer_decay
        self.input_size = (run.input_size, run.input_size) if run.input_size else None
        image_size = self.input_size or image_size
        name = run.model.removeprefix("timm/")
        check_timm(name)
        options: dict[str, Any] = {
            "img_size": image_size,
            "patch_size": run.patch_size,
            "drop_path_rate": run.drop_path,
        }
        if run.global_pool:
            options["global_pool"] = run.global_pool
        try:
            self.backbone = timm.create_model(name, num_classes=0, **options)
            with torch.no_grad():
                self.dim = self.backbone.eval()(torch.zeros(1, 3, *image_size)).shape[1]
        except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if "unexpected keyword" in reason:
                reason = "it is no ViT, which can be given an image size and a patch size"
            sizes = f"image size {image_size}, patch_size={run.patch_size}"
            raise ValueError(f"{run.model} cannot be made for {sizes}: {reason}") from None
        if run.n_lpa:
            localize(self.backbone, range(run.n_lpa), run.lpa_start, run.lambda_init)
        for module in list(self.backbone.modules()):  # timm's draws would depend on the number of processes
            for child_name, child in module.named_children():
                if isinstance(child, timm.layers.DropPath):
                    setattr(module, child_name, DropPath(child.drop_prob))

        if run.frozen_blocks:
            layers = timm.models.group_parameters(self.backbone, cast(Any, self.backbone).group_matcher(coarse=False))
            blocks = len(getattr(self.backbone, "blocks", layers))
            if run.frozen_blocks > blocks:
                raise ValueError(f"frozen_blocks={run.frozen_blocks} is more than the {blocks} blocks of {run.model}")
            shallow = range(run.frozen_blocks + 1)  # layer 0 is the patch embedding
            self.kept = frozenset(f"backbone.{name}" for layer in shallow for name in layers[layer])

    # Where the instrument finds grid and prefix tokens.
    patch_embed = property(lambda self: self.backbone.patch_embed)
    num_prefix_tokens = property(lambda self: self.backbone.num_prefix_tokens)

    def grow(self, num_classes: int, divergence: bool = False) -> None:
        """Add a task of `num_classes` classes: a head."""
        device = next(self.backbone.parameters()).device
        self.heads.append(Head(self.dim, num_classes, self.init_std).to(device))

    @property
    def added(self) -> set[str]:
        """Names of what LPA adds to the backbone, which files of its weights need not have."""
        parts = [name for name, module in self.backbone.named_modules() if isinstance(module, LocalizedAttention)]
        return {f"{name}.{parameter}" for name in parts for parameter in ("pos_weight", "content_scale")}

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """With layer_decay as timm has it (BEiT, arXiv 2106.08254): the heads at the full learning rate."""
        if self.layer_decay == 1:
            return super().parameter_groups(weight_decay)
        undecayed: set[str] = getattr(self.backbone, "no_weight_decay", set)()
        layers = param_groups_layer_decay(
            self.backbone, weight_decay, no_weight_decay_list=undecayed, layer_decay=self.layer_decay
        )
        return [*layers, *param_groups_weight_decay(self.heads, weight_decay)]

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 1, dim]"""
        if self.input_size is not None:
            x = F.interpolate(x, self.input_size, mode="bicubic")
        return self.backbone(x)[:, None]


def check_timm(name: str) -> None:
    """Raises ValueError with the near names when timm has no such model."""
    if not timm.is_model(name.split(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ValueError(f"timm has no model {name!r}" + (f"; near: {', '.join(near)}" if near else ""))


def pretrained_config(model: str) -> Any:
    """timm's, of the weights that go by the name of `model`, timm/NAME. Raises ValueError where timm has none."""
    name = model.removeprefix("timm/")
    check_timm(name)
    config = timm.get_pretrained_cfg(name)
    if config is None:
        raise ValueError(f"normalization=model: timm knows no weights of {name}, and so not what pixels they want")
    return config


def create_model(run: Run, image_size: tuple[int, int]) -> Incremental:
    """The run's network before its first task. Raises ValueError where model, image and patch size do not fit."""
    kind = IncrementalTimm if run.model.startswith("timm/") else IncrementalViT
    return kind(run, image_size)


def self_attention(run: Run, index: int, grid: tuple[int, int]) -> nn.Module:
    """The attention layer of block `index`: LPA in the first n_lpa blocks, run.attention in the others."""
    return ATTENTION["lpa" if index < run.n_lpa else run.attention](run, grid)


@torch.no_grad()
def drop_path_calls(model: Incremental, image_size: tuple[int, int]) -> list[tuple[DropPath, tuple[int, ...]]]:
    """The calls of stochastic depth in a training step, in order: the module, and the shape of what it draws for an image.

    Found by watching one image pass in eval mode; modules that are frozen in eval mode draw nothing and are left out.
    """
    paths = [m for m in model.modules() if isinstance(m, DropPath)]
    calls: list[tuple[DropPath, tuple[int, ...]]] = []
    modes = {module: module.training for module in model.modules()}
    model.eval()
    for path in paths:
        path.calls = calls
    try:
        model.forward_features(torch.zeros(1, 3, *image_size, device=next(model.parameters()).device))
    finally:
        for path in paths:
            path.calls = None
        for module, training in modes.items():
            module.training = training
    return [(path, shape) for path, shape in calls if path.training and path.p]


def init_weights(module: nn.Module, std: float) -> None:
    """Linear layers: truncated normal, bias 0 (protocol, section 2, where std is 0.02)."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=std)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
