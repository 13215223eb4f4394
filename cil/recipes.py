"""The runs of the paper by name: what to train for each cell of its tables and each point of its sweeps, at six scales.

    paper               the protocol at full size, on a GPU
    paper-as-released   the same with the quirks of the released code, each a setting of its own
    learned             ten classes of real CIFAR-100, trained until new classes are learned, a quarter of an hour on one core
    small               real CIFAR-100, all classes, cut to minutes on one core; few of the new classes are learned
    demo                digits, seconds

A name is SCALE[-imagenet][-SCENARIO]-METHOD: paper-b50-5-dytox-lpa, demo-baseline. Sweeps end in -lambda-VALUE or
-nlpa-COUNT; CONTROLS have a name each, like -lpa-frozen. Train one with
`locality-probe train NAME --out DIR`; its joint counterpart is NAME-joint (a model per step) or NAME-joint-terminal (one model
on all classes) or NAME-joint-as-long (the same for as many steps as NAME takes in all). A new recipe is a function with
@recipe.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from cil.run import Run

RECIPES: dict[str, Callable[[], Run]] = {}


def recipe(function: Callable[[], Run], name: str = "") -> Callable[[], Run]:
    """Enter a function under a name, or its own with hyphens. Its docstring says what it costs and what to expect."""
    RECIPES[name or function.__name__.replace("_", "-")] = function
    return function


def find(name: str) -> Run:
    """The run of a recipe, with its name in it. Raises ValueError that lists near names, or all."""
    base, training = split(name)
    if base not in RECIPES:
        near = difflib.get_close_matches(base, RECIPES, n=3) or sorted(RECIPES)
        raise ValueError(
            f"no recipe {name!r}; there: {', '.join(near)} (each also with -joint, -joint-terminal, -joint-as-long)"
        )
    return replace(RECIPES[base](), recipe=name, training=training)


def split(name: str) -> tuple[str, str]:
    """A name -> (the name of its incremental run, training)."""
    for training in ("joint-as-long", "joint-terminal", "joint"):
        if name.endswith("-" + training):
            return name.removesuffix("-" + training), training
    return name, "incremental"


def parts(name: str) -> tuple[str, str, str]:
    """The name of a recipe -> (scale, setting, system), whatever its training: small-b10-10-dytox-joint is (small, b10-10,
    dytox). Raises ValueError for a name that is not made of them."""
    base, _ = split(name)
    for scale in sorted([*SCALES, "finetune"], key=len, reverse=True):
        for setting in sorted(FINETUNE if scale == "finetune" else settings_of(scale), key=len, reverse=True):
            start = f"{scale}-{setting}-" if setting else f"{scale}-"
            if base in RECIPES and base.startswith(start):
                return scale, setting, base.removeprefix(start)
    raise ValueError(f"recipe {name!r} is not of the form SCALE-SETTING-SYSTEM")


# Scales: the baseline on CIFAR-100 B10-10, or digits.


def paper() -> Run:
    """The protocol of arXiv 2304.06971."""
    return Run()


def paper_as_released() -> Run:
    """As the released code trains on two processes: what it does otherwise than the paper says, switch by switch."""
    return replace(
        paper(),
        memory_mode="per-process:2", herding_crop=True, cosine_epochs_first=600, schedule_late=True, repeats=3,
        lambda_init_mode="normal", eval_amp="fp16", frozen_eval=False,
    )  # fmt: skip


def small() -> Run:
    """All of CIFAR-100's classes and 50 training images of each. How it was chosen: README, "How small was chosen"."""
    return replace(
        paper(),
        images_per_class=50, dim=108, num_heads=9, init_std=0.06,
        epochs_first=12, epochs=12, batch_size=16, lr_first=5e-4, lr=5e-4, warmup_epochs=1, warmup_lr=2e-4,
        finetune_epochs=10, finetune_lr=5e-4, rand_augment="", mixup=0.0, memory=500,
    )  # fmt: skip


def learned() -> Run:
    """Ten classes of CIFAR-100 in 5 tasks of 2, 200 training images of each. How it was chosen: docs/learned."""
    return replace(
        paper(),
        scenario="B2-2", num_classes=10, images_per_class=200, dim=72, num_heads=9, depth=4, init_std=0.06,
        epochs_first=54, epochs=54, batch_size=32, lr_first=1e-3, lr=1e-3, warmup_epochs=2, warmup_lr=1e-4,
        finetune_epochs=10, finetune_lr=3e-4, rand_augment="", mixup=0.0, memory=200,
        checkpoints="0,10,30,100,300,1000,2000,3000,4000",
    )  # fmt: skip


def demo() -> Run:
    """scikit-learn's digits, 5 tasks of 2 classes, 50 images each, 3 self-attention blocks of dimension 36."""
    return Run(
        dataset="digits", class_order="alphabetical", scenario="B2-2", images_per_class=50,
        dim=36, num_heads=9, depth=4, patch_size=1, init_std=0.1,
        epochs_first=25, epochs=25, batch_size=32, lr_first=2e-3, lr=2e-3, warmup_epochs=3, finetune_epochs=10,
        finetune_lr=2e-4, crop_padding=1, flip=False, rand_augment="", mixup=0.0, memory=100,
    )  # fmt: skip


def on_imagenet(run: Run) -> Run:
    """The same on ImageNet-100: 224 pixels in patches of 16; files are cut by RandomResizedCrop as they are read."""
    return replace(run, dataset="imagenet100", class_order="imagenet100", image_size=224, patch_size=16, crop_padding=0)


def with_lpa(run: Run) -> Run:
    """The same with all its self-attention blocks LPA."""
    return replace(run, n_lpa=run.depth - 1)


def with_dytox(run: Run) -> Run:
    """The same network with a token a task; with mixup, as in the paper, it is DyTox+."""
    return replace(run, method="dytox")


# Fine-tuning: timm's backbones, which start from weights.


def finetune() -> Run:
    """timm's ViT-B/16, trained on ImageNet-21k and -1k, on CIFAR-100 at 224 pixels: most who do CIL with ViTs start there."""
    return replace(
        paper(),
        model="timm/vit_base_patch16_224", weights="hub", patch_size=16, input_size=224, normalization="model",
        drop_path=0.0, layer_decay=0.75, weight_decay=0.05,
        epochs_first=20, epochs=20, batch_size=64, lr_first=2e-4, lr=2e-4, warmup_epochs=2, finetune_epochs=10,
        rand_augment="", mixup=0.0, amp="bf16",
    )  # fmt: skip


def finetune_demo() -> Run:
    """The digits 0 to 4, two and then one at a time, by a small ViT that has learned the others."""
    return replace(
        demo(),
        model="timm/test_vit", weights="recipe:finetune-demo-pretraining", patch_size=2, num_classes=5, scenario="B2-1",
        drop_path=0.0, layer_decay=0.75, epochs_first=15, epochs=15, lr_first=1e-3, lr=1e-3, memory=50,
    )  # fmt: skip


def finetune_demo_pretraining() -> Run:
    """The digits 9 to 5 at once, from scratch."""
    return replace(
        demo(),
        model="timm/test_vit", patch_size=2, class_order="reversed", num_classes=5, scenario="B5-5", images_per_class=0,
        drop_path=0.0, epochs_first=60, memory=0,
    )  # fmt: skip


SCALES = {"paper": paper, "paper-as-released": paper_as_released, "learned": learned, "small": small, "demo": demo}
SYSTEMS: dict[str, tuple[str, Callable[[Run], Run]]] = {
    "baseline": ("baseline", lambda run: run),
    "baseline-lpa": ("baseline + LPA", with_lpa),
    "dytox": ("DyTox+", with_dytox),
    "dytox-lpa": ("DyTox+ + LPA", lambda run: with_lpa(with_dytox(run))),
}
# The mixup of DyTox+ at scales whose baseline has none; at `small` and `demo` DyTox stays without, and without the +.
MIXUP_OF_DYTOX = {"learned": 0.8}
# What takes the systems apart, in the first setting of each scale. At gate 6 the share of positional attention is 0.998, and
# GPSA's D_loc starts at 1.196 patches where LPA's does at 1.189.
CONTROLS: dict[str, tuple[str, Callable[[Run], Run]]] = {
    "baseline-mhsa": ("baseline with plain attention", lambda run: replace(run, attention="mhsa")),
    "baseline-gate": ("baseline that starts as local as LPA", lambda run: replace(run, gate_init=6.0)),
    "baseline-lpa-frozen": ("baseline + LPA, v frozen", lambda run: replace(with_lpa(run), positional_frozen=True)),
    "baseline-lpa-random": ("baseline + LPA, v random", lambda run: replace(with_lpa(run), positional_start="random")),
}
SCENARIOS = {"cifar": ("B10-10", "B5-5", "B50-10", "B50-5"), "imagenet": ("B10-10", "B50-10", "B50-5")}
LAMBDAS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # the range of the paper's Fig. 8
# Last / Avg / Fgt of the SYSTEMS in turn: Table 1 (CIFAR-100) and Table 2 (ImageNet-100).
PUBLISHED = {
    "b10-10": ("63.11 / 74.74 / 12.52", "65.27 / 76.50 / 11.20", "66.79 / 77.66 / 15.36", "68.92 / 78.74 / 14.30"),
    "b5-5": ("60.23 / 72.91 / 12.47", "60.38 / 73.14 / 12.45", "62.60 / 76.02 / 21.48", "63.99 / 77.21 / 20.73"),
    "b50-10": ("66.20 / 73.70 / 11.82", "68.52 / 74.96 / 10.02", "69.64 / 76.00 / 9.464", "69.76 / 76.19 / 9.708"),
    "b50-5": ("63.77 / 71.86 / 14.84", "65.54 / 73.08 / 13.22", "65.70 / 73.30 / 15.13", "66.71 / 74.27 / 13.57"),
    "imagenet-b10-10": (
        "61.02 / 72.84 / 14.38", "61.98 / 74.81 / 16.16", "65.78 / 76.35 / 17.89", "67.54 / 77.85 / 17.02"),
    "imagenet-b50-10": (
        "68.10 / 75.62 / 15.86", "70.74 / 76.83 / 13.93", "71.32 / 78.08 / 9.42", "71.70 / 78.46 / 9.78"),
    "imagenet-b50-5": (
        "65.4 / 74.54 / 19.75", "67.9 / 75.38 / 18.30", "66.38 / 75.46 / 16.92", "68.08 / 76.26 / 16.31"),
}  # fmt: skip
# What a run costs, by scale and setting, and the Last / Avg / Fgt that one of seed 0 gave.
GPU = "steps at batch 256, which needs a GPU"
TIMM = "timm's weights, from the HuggingFace hub or --set weights=FILE"
COSTS = {
    "paper b10-10": f"156 560 {GPU}", "paper b5-5": f"200 960 {GPU}", "paper b50-10": f"130 200 {GPU}",
    "paper b50-5": f"151 900 {GPU}", "paper imagenet-b10-10": f"339 460 {GPU}", "paper imagenet-b50-10": f"301 200 {GPU}",
    "paper imagenet-b50-5": f"325 900 {GPU}",
    "small b10-10": "9 682 steps at batch 16, 11 to 13 minutes on one core",
    "small b5-5": "15 924 steps at batch 16, about 19 minutes on one core",
    "small b50-10": "7 010 steps at batch 16, about 9 minutes on one core",
    "small b50-5": "10 112 steps at batch 16, about 12 minutes on one core",
    "learned b2-2": "4 776 steps at batch 32, about 9 minutes on one core",
    "learned b6-2": "4 062 steps at batch 32, about 8 minutes on one core",
    "learned b2-2-alphabetical": "4 776 steps at batch 32, about 9 minutes on one core, as b2-2",
    "demo": "795 steps at batch 32, under a minute on one core",
    "finetune b10-10": f"23 910 steps at batch 64 and 224 pixels, which need a GPU, and {TIMM}",
    "finetune demo": "about a minute on one core, and once another for the weights that it starts from",
}  # fmt: skip
MEASURED = {
    "demo-baseline": "80.22 / 89.60 / 12.71",
    "demo-baseline-lpa": "84.89 / 92.28 / 9.12",
    "finetune-demo-pretraining": "96.43 / 96.43 / -, one task",
    "finetune-demo-baseline": "69.47 / 82.55 / 28.73",
    "finetune-demo-baseline-lpa": "73.01 / 83.43 / 25.41",
    "small-b10-10-baseline": "12.55 / 22.64 / 3.67, three seeds",
    "small-b10-10-baseline-lpa": "14.10 / 24.69 / 3.65, three seeds",
    "small-b10-10-dytox": "10.64 / 21.22 / 10.94, three seeds",
    "small-b10-10-dytox-lpa": "10.90 / 22.56 / 11.56, three seeds",
    "small-b5-5-baseline": "12.51 / 24.07 / 5.56",
    "small-b5-5-baseline-lpa": "13.42 / 25.55 / 5.21",
    "small-b50-10-baseline": "13.34 / 16.26 / 0.72",
    "small-b50-10-baseline-lpa": "14.91 / 17.68 / 0.73",
    "small-b50-5-baseline": "12.26 / 15.50 / 1.64",
    "small-b50-5-baseline-lpa": "14.21 / 17.33 / 1.06",
}


def enter(scale: str, setting: str, system: str, what: str, build: Callable[[], Run], published: str = "") -> None:
    """A recipe under SCALE-SETTING-SYSTEM, with a docstring that says what, command, cost and expected numbers."""
    name = "-".join(filter(None, (scale, setting, system)))
    cost = COSTS[f"{scale.removesuffix('-as-released')} {setting}".strip()]
    expected = [f"Published Last / Avg / Fgt: {published}."] * bool(published)
    expected += [f"Measured Last / Avg / Fgt: {MEASURED[name]}." if name in MEASURED else "Not yet run."]

    def function() -> Run:
        return build()

    function.__doc__ = f"{what}. Command: locality-probe train {name}. Cost: {cost}. {' '.join(expected)}"
    recipe(function, name)


def settings_of(scale: str) -> dict[str, tuple[str, Callable[[Run], Run]]]:
    """Name of a setting -> (title, what it changes)."""
    if scale == "demo":
        return {"": ("digits B2-2", lambda run: run)}
    if scale == "learned":
        return {
            "b2-2": ("ten classes of CIFAR-100 B2-2", lambda run: run),
            "b6-2": ("ten classes of CIFAR-100 B6-2", lambda run: replace(run, scenario="B6-2")),
            "b2-2-alphabetical": (
                "another ten classes of CIFAR-100 B2-2, in alphabetical order",
                lambda run: replace(run, class_order="alphabetical"),
            ),
        }
    found = {s.lower(): (f"CIFAR-100 {s}", _to_scenario(s)) for s in SCENARIOS["cifar"]}
    if scale.startswith("paper"):
        for s in SCENARIOS["imagenet"]:
            found[f"imagenet-{s.lower()}"] = (f"ImageNet-100 {s}", _to_scenario(s, on_imagenet))
    return found


def with_lpa_in_timm(run: Run) -> Run:
    """The same with LPA in all blocks of its timm model, which begin with their weights' own attention."""
    return replace(run, n_lpa=6 if run.model == "timm/test_vit" else 12, lpa_start="content")


# Setting -> title, run.
FINETUNE: dict[str, tuple[str, Callable[[], Run]]] = {
    "b10-10": ("ViT-B/16 of timm from its weights, CIFAR-100 B10-10", finetune),
    "demo": ("a small ViT from weights, digits 0 to 4", finetune_demo),
}
FINETUNED = {"baseline": ("", lambda run: run), "baseline-lpa": (" + LPA", with_lpa_in_timm)}


def _to_scenario(scenario: str, change: Callable[[Run], Run] = lambda run: run) -> Callable[[Run], Run]:
    return lambda run: change(replace(run, scenario=scenario))


def _changed(
    base: Callable[[], Run], change: Callable[[Run], Run] = lambda run: run, **settings: Any
) -> Callable[[], Run]:
    return lambda: replace(change(base()), **settings)


def enter_all() -> None:
    """The SYSTEMS in every setting of every scale; CONTROLS and both sweeps in the first."""
    for scale, base in SCALES.items():
        for place, (setting, (where, move)) in enumerate(settings_of(scale).items()):
            for column, (system, (title, change)) in enumerate(SYSTEMS.items()):
                plus = MIXUP_OF_DYTOX.get(scale, base().mixup) if "dytox" in system else base().mixup
                title = title if plus else title.replace("DyTox+", "DyTox")  # mixup is what the + means
                published = PUBLISHED[setting][column] if scale.startswith("paper") else ""
                moved = _changed(_changed(base, move), change, mixup=plus)
                enter(scale, setting, system, f"{title}, {where}", moved, published)
            if place:
                continue
            for system, (title, change) in CONTROLS.items():
                enter(scale, setting, system, f"{title}, {where}", _changed(base, change))
            for value in LAMBDAS:
                name, title = f"baseline-lambda-{value:g}", f"baseline + LPA, lambda_init={value:g}, {where}"
                enter(scale, setting, name, title, _changed(base, with_lpa, lambda_init=value))
            for count in range(base().depth):
                name, title = f"baseline-nlpa-{count}", f"baseline, LPA in {count} layers, {where}"
                enter(scale, setting, name, title, _changed(base, n_lpa=count))

    for setting, (what, build) in FINETUNE.items():
        for system, (plus_lpa, change) in FINETUNED.items():
            enter("finetune", setting, system, what + plus_lpa, _changed(build, change))
    what = "what the demo of fine-tuning starts from: a small ViT, digits 5 to 9"
    enter("finetune", "demo", "pretraining", what, finetune_demo_pretraining)


enter_all()
