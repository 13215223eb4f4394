"""cil.augment and cil.draws against the per-image pipeline they stand for: timm, torchvision and Pillow are the reference.

Statistical tests have fixed seeds, so they pass or fail for good; their thresholds leave room for one unlucky seed.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import timm.data.mixup
import torch
from PIL import Image
from scipy import stats
from sklearn.datasets import load_sample_images
from timm.data import Mixup, auto_augment, create_transform
from torchvision import transforms

from cil import augment, device, draws
from cil.run import Run

SPEC = "rand-m9-mstd0.5-inc1"
FILL = (124, 116, 104)
UNLIKELY = 1e-4  # p-value under which two samples are held to differ
SIZES = [(32, 32), (24, 40), (8, 8)]  # height, width
LEVELS = [0.0, 1.3, 2.7, 4.1, 5.0, 6.6, 8.6, 9.0, 9.33, 10.0]
# The operations in timm's order, by timm's names; "Increasing" goes on or off, "Rel" is no part of ours.
NAMES = [(True, name) for name in auto_augment._RAND_INCREASING_TRANSFORMS] + [
    (False, name) for name in auto_augment._RAND_TRANSFORMS if name not in auto_augment._RAND_INCREASING_TRANSFORMS
]
CONTINUOUS = {"Rotate", "Color", "Contrast", "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY"}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def our_name(name: str) -> str:
    return name.removesuffix("Increasing").removesuffix("Rel")


@pytest.fixture(scope="module")
def photos() -> dict[tuple[int, int], torch.Tensor]:
    """By (height, width): uint8 [43, 3, height, width], of crops of two photographs, noise, and flat colours."""
    rng, sources, made = np.random.default_rng(0), load_sample_images().images, {}
    for h, w in SIZES:
        batch = []
        for i in range(32):
            source, side = sources[i % 2], rng.integers(40, 200)
            y, x = (rng.integers(length - side) for length in source.shape[:2])
            crop = Image.fromarray(source[y : y + side, x : x + side])
            batch.append(np.asarray(crop.resize((w, h), Image.Resampling.LANCZOS)))
        batch += [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for _ in range(8)]
        batch += [np.full((h, w, 3), level, np.uint8) for level in (0, 77, 255)]
        made[h, w] = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).contiguous()
    return made


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]


def from_pil(images: list[Image.Image]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)


def posterize(image: Image.Image, bits: int, **_) -> Image.Image:
    """timm's, which Pillow 13 refuses at 0 bits; before, that gave black."""
    return auto_augment.posterize(image, bits) if bits else Image.new(image.mode, image.size)


def timm_apply(name: str, image: Image.Image, level: float, sign: int, monkeypatch: pytest.MonkeyPatch) -> Image.Image:
    function = posterize if "Posterize" in name else auto_augment.NAME_TO_OP[name]
    return function(image, *timm_arguments(name, level, sign, monkeypatch), fillcolor=FILL, resample=Image.BICUBIC)


def timm_arguments(name: str, level: float, sign: int, monkeypatch: pytest.MonkeyPatch) -> tuple:
    monkeypatch.setattr(auto_augment, "_randomly_negate", lambda value: sign * value)
    to_argument = auto_augment.LEVEL_TO_ARG[name]
    return to_argument(level, {}) if to_argument else ()


def timm_rand_augment(spec: str = SPEC) -> auto_augment.RandAugment:
    training = create_transform(32, is_training=True, auto_augment=spec, interpolation="bicubic")
    made = next(t for t in training.transforms if isinstance(t, auto_augment.RandAugment))
    for op in made.ops:
        assert op.kwargs == {"fillcolor": FILL, "resample": Image.Resampling.BICUBIC}
        if "Posterize" in op.name:
            op.aug_fn = posterize
    return made


# Pixels


@pytest.mark.parametrize(("increasing", "name"), NAMES, ids=lambda value: value if isinstance(value, str) else "")
def test_operation_makes_pillows_pixels(increasing, name, photos, monkeypatch):
    apply, to_argument = augment.APPLY[our_name(name)], augment.arguments(increasing)[our_name(name)]
    ground = torch.tensor(FILL).float()
    differences = []
    for images in photos.values():
        pil, ones = to_pil(images), torch.ones(len(images), dtype=torch.float64)
        for level in LEVELS:
            for sign in (-1, 1):
                argument = to_argument(level / 10 * ones, sign * ones)
                expected_argument = timm_arguments(name, level, sign, monkeypatch)
                assert not expected_argument or (argument == expected_argument[0]).all()
                expected = from_pil([timm_apply(name, image, level, sign, monkeypatch) for image in pil])
                got = apply(images, argument.float(), ground)
                assert got.dtype == torch.uint8
                differences.append((got.int() - expected.int()).abs().flatten())
    difference = torch.cat(differences)
    exact = name not in {"AutoContrast", "Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"}
    assert difference.max() <= (0 if exact else 1)
    assert (difference > 0).float().mean() < 2.5e-3


def test_operations_are_timms_in_timms_order():
    for increasing, names in [
        (True, auto_augment._RAND_INCREASING_TRANSFORMS),
        (False, auto_augment._RAND_TRANSFORMS),
    ]:
        assert list(augment.arguments(increasing)) == list(augment.APPLY) == [our_name(name) for name in names]


def test_pixels_that_map_onto_the_very_edge(photos):
    ground = torch.tensor(FILL).float()
    for (h, w), images in photos.items():
        for name, length in [("TranslateX", w), ("TranslateY", h)]:
            for pixels in (-2.5, -1.0, 0.5, 3.5):
                translate = auto_augment.NAME_TO_OP[name + "Rel"]
                part = pixels / length
                expected = [translate(i, part, fillcolor=FILL, resample=Image.BICUBIC) for i in to_pil(images)]
                got = augment.APPLY[name](images, torch.full((len(images),), part), ground)
                assert (got.int() - from_pil(expected).int()).abs().max() <= 1


def test_arguments_are_applied_image_by_image(photos):
    images = photos[24, 40]
    level = torch.linspace(0, 1, len(images), dtype=torch.float64)
    sign = 1 - 2 * (torch.arange(len(images)) % 2)
    ground = torch.tensor(FILL).float()
    for name, to_argument in augment.arguments(True).items():
        apply = augment.APPLY[name]
        argument = to_argument(level, sign).float()
        alone = torch.cat([apply(images[i : i + 1], argument[i : i + 1], ground) for i in range(len(images))])
        assert torch.equal(apply(images, argument, ground), alone), name


@pytest.mark.parametrize("spec", [SPEC, "rand-m4-mstd3-n3"])
def test_rand_augment_is_timms_chain_for_the_same_draws(spec, photos, monkeypatch):
    images = photos[32, 32].repeat(6, 1, 1, 1)
    config = augment.parse(spec)
    names = auto_augment._RAND_INCREASING_TRANSFORMS if config.increasing else auto_augment._RAND_TRANSFORMS
    expected = to_pil(images)
    for layer in zip(*draws.levels(len(images), config, generator(3)), strict=True):
        for i, (operation, level, sign) in enumerate(zip(*(values.tolist() for values in layer), strict=True)):
            if operation >= 0:
                expected[i] = timm_apply(names[operation], expected[i], level, sign, monkeypatch)
    before = images.clone()
    got = rand_augment(images, spec, generator(3))
    difference = (got.int() - from_pil(expected).int()).abs()
    assert (difference > 1).float().mean() < 1e-3  # a later operation can enlarge a difference of 1
    assert (difference > 0).float().mean() < 5e-3
    assert torch.equal(images, before)
    assert (got != images).flatten(1).any(1).float().mean() > 0.5


def test_fill_colour_is_used(photos):
    images = photos[32, 32]
    lime, default = (rand_augment(images, SPEC, generator(), *fill) for fill in ([(50, 205, 7)], []))
    changed = (lime != default).any(1)
    assert 0.01 < changed.float().mean() < 0.5
    direct = (lime == torch.tensor([50, 205, 7]).view(3, 1, 1)).all(1) & (
        default == torch.tensor(FILL).view(3, 1, 1)
    ).all(1)
    assert (changed & direct).sum() > 0.3 * changed.sum()  # the others were changed by a second operation


# What is drawn


def timm_draws(spec: str, count: int) -> tuple[list[int], dict[str, list]]:
    """How many operations each of `count` images got, and by operation (our names) the arguments it got."""
    np.random.seed(0)
    auto_augment.random.seed(0)
    rand_augment = timm_rand_augment(spec)
    current, applied, arguments = [], [], {our_name(op.name): [] for op in rand_augment.ops}
    for op in rand_augment.ops:
        op.aug_fn = lambda image, *values, name=op.name, **_: current.append((our_name(name), values)) or image
    for _ in range(count):
        current.clear()
        rand_augment(None)
        applied.append(len(current))
        for name, values in current:
            arguments[name].extend(values or [0.0])
    return applied, arguments


def our_draws(spec: str, count: int) -> tuple[list[int], dict[str, list]]:
    config = augment.parse(spec)
    operation, level, sign = draws.levels(count, config, generator())
    arguments = {}
    for number, (name, to_argument) in enumerate(augment.arguments(config.increasing).items()):
        chosen = operation == number
        made = to_argument(level[chosen] / 10, sign[chosen])
        has_argument = name not in {"AutoContrast", "Equalize", "Invert"}
        arguments[name] = (made if has_argument else torch.zeros_like(made)).tolist()
    return (operation >= 0).sum(0).tolist(), arguments


def p_same_counts(ours: list, theirs: list) -> float:
    ours, theirs = Counter(ours), Counter(theirs)
    values = sorted(ours.keys() | theirs.keys())
    rare = [v for v in values if ours[v] + theirs[v] < 10]  # too few for chi-square: one bin together
    table = np.array([[c[v] for v in values if v not in rare] + [sum(c[v] for v in rare)] for c in (ours, theirs)])
    table = table[:, table.sum(0) > 0]
    return stats.chi2_contingency(table).pvalue if table.shape[1] > 1 else 1.0


@pytest.mark.parametrize("spec", [SPEC, "rand-m5-mstd2.5-inc0-n3", "rand-m9-inc1", "rand-mstd1"])
def test_draws_are_distributed_as_timms(spec):
    (our_applied, ours), (their_applied, theirs) = our_draws(spec, 20_000), timm_draws(spec, 20_000)
    assert p_same_counts(our_applied, their_applied) > UNLIKELY
    frequency = [[len(arguments[name]) for name in theirs] for arguments in (ours, theirs)]
    assert stats.chi2_contingency(frequency).pvalue > UNLIKELY
    for name in theirs:
        # Signed arguments, so that this tests the signs too. Ties, where the level is clipped, make KS too lenient:
        # hence the test of the clipped share.
        mine, timms = np.round(ours[name], 9), np.round(theirs[name], 9)
        if name in CONTINUOUS and "mstd" in spec:
            assert stats.ks_2samp(mine, timms).pvalue > UNLIKELY, name
            furthest = max(abs(mine).max(), abs(timms).max())
            mine, timms = abs(mine) == furthest, abs(timms) == furthest
        assert p_same_counts(mine.tolist(), timms.tolist()) > UNLIKELY, name


def test_signs_are_even_and_all_draws_independent():
    operation, level, sign = draws.levels(60_000, augment.parse(SPEC), generator(1))
    pairs = torch.bincount((operation[0] + 1) * 16 + operation[1] + 1, minlength=256).view(16, 16)
    assert stats.chi2_contingency(pairs).pvalue > UNLIKELY
    assert pairs[1:, 1:].diagonal().min() > 20  # the same operation may come twice
    assert stats.binomtest(int((sign > 0).sum()), sign.numel()).pvalue > UNLIKELY
    strong = level > 9
    for a, b in [(sign[0], sign[1]), (strong[0], strong[1]), (sign[0], strong[0]), (sign[0], operation[0] % 2)]:
        a, b = (a > 0), (b > 0)
        table = [[(a & b).sum(), (a & ~b).sum()], [(~a & b).sum(), (~a & ~b).sum()]]
        assert stats.chi2_contingency(np.array(table, dtype=int)).pvalue > UNLIKELY


def test_augmented_copies_are_distributed_as_timms(photos):
    copies = 3000
    np.random.seed(1)
    auto_augment.random.seed(1)
    timms = timm_rand_augment()
    for image in photos[32, 32][:3]:
        batch = image.expand(copies, -1, -1, -1)
        ours = rand_augment(batch, SPEC, generator(2)).double()
        theirs = from_pil([timms(pil) for pil in to_pil(image[None]) * copies]).double()
        same = [int((made == image).flatten(1).all(1).sum()) for made in (ours, theirs)]
        assert stats.chi2_contingency([same, [copies - count for count in same]]).pvalue > UNLIKELY
        for statistic in (lambda x: x.mean((2, 3)), lambda x: x.std((2, 3)), lambda x: x[:, :, 5, 9]):
            a, b = statistic(ours).numpy(), statistic(theirs).numpy()
            standard_error = np.sqrt((a.var(0) + b.var(0)) / copies)
            assert (abs(a.mean(0) - b.mean(0)) < 4 * standard_error).all()
            for channel in range(3):
                assert stats.ks_2samp(a[:, channel], b[:, channel]).pvalue > UNLIKELY


# Crop, flip, normalise


@pytest.mark.parametrize(("size", "padding"), [((32, 32), 4), ((8, 8), 4), ((6, 11), 1), ((8, 8), 0)])
def test_crop_is_a_padded_slice_at_every_offset_alike(size, padding):
    h, w = size
    image = torch.randint(1, 256, (3, h, w), generator=generator(), dtype=torch.uint8)
    batch = 2430
    offsets = draws.crop_offsets(batch, padding, generator(1))
    crops = augment.crop(image.expand(batch, -1, -1, -1), offsets, padding)
    padded = torch.nn.functional.pad(image, (padding,) * 4)
    offsets = range(2 * padding + 1)
    hits = torch.stack([(crops == padded[:, y : y + h, x : x + w]).flatten(1).all(1) for y in offsets for x in offsets])
    assert (hits.sum(0) == 1).all()
    if padding:
        assert stats.chisquare(hits.sum(1)).pvalue > UNLIKELY


def test_crop_takes_each_image_from_itself():
    images = torch.arange(1, 51, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 9, 7)
    crops = augment.crop(images, draws.crop_offsets(len(images), 2, generator()), 2)
    assert ((crops == images) | (crops == 0)).all() and (crops[:, :, 2:-2, 2:-2] == images[:, :, 2:-2, 2:-2]).all()


def test_flip_mirrors_half_of_the_images():
    images = torch.randint(0, 256, (4000, 3, 4, 6), generator=generator(), dtype=torch.uint8)
    flipped = augment.flip(images, draws.flips(len(images), generator(1)))
    mirrored = (flipped == images.flip(3)).flatten(1).all(1)
    kept = (flipped == images).flatten(1).all(1)
    assert (mirrored ^ kept).all()
    assert stats.binomtest(int(mirrored.sum()), len(images)).pvalue > UNLIKELY


def test_normalize_is_torchvisions(photos):
    mean, std = (0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)
    reference = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])
    for images in photos.values():
        got = augment.normalize(images, mean, std)
        torch.testing.assert_close(got, torch.stack([reference(image) for image in to_pil(images)]), rtol=0, atol=2e-6)


# Mixup


@pytest.mark.parametrize("lam", [0.0, 0.03, 0.5, 0.81, 1.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixup_is_timms_for_the_same_lambda(lam, smoothing, monkeypatch):
    images = torch.randn(16, 3, 8, 8, generator=generator())
    labels = torch.randint(0, 10, (16,), generator=generator())
    monkeypatch.setattr(timm.data.mixup.np.random, "beta", lambda *_, **__: lam)
    expected = Mixup(mixup_alpha=0.8, label_smoothing=smoothing, num_classes=10)(images.clone(), labels)
    got = augment.mixup(images, labels, 10, lam, smoothing)
    for mine, timms in zip(got, expected, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, timms, rtol=0, atol=2e-6)


def test_mixup_lambda_follows_the_beta_distribution():
    np.random.seed(0)
    for alpha in (0.2, 0.8, 3.0):
        g = generator()
        images, labels = torch.tensor([1.0, 0.0]).view(2, 1, 1, 1), torch.tensor([0, 1])
        drawn = []
        for _ in range(3000):
            mixed, targets = augment.mixup(images, labels, 2, draws.mixup_lambda(alpha, g), 0.0)
            torch.testing.assert_close(mixed.flatten(), targets[:, 0])  # one lambda, for images and labels
            torch.testing.assert_close(mixed.sum(), torch.tensor(1.0))
            drawn.append(mixed[0].item())
        assert stats.ks_2samp(drawn, np.random.beta(alpha, alpha, 20_000)).pvalue > UNLIKELY
        assert stats.kstest(drawn, stats.beta(alpha / 2, alpha / 2).cdf).pvalue < UNLIKELY  # could have told


def test_mixup_without_mixing_still_smooths():
    images, labels = torch.randn(3, 3, 4, 4, generator=generator(1)), torch.tensor([2, 0, 4])
    mixed, targets = augment.mixup(images, labels, 5, None, 0.1)
    assert torch.equal(mixed, images)
    torch.testing.assert_close(targets, torch.eye(5)[labels] * 0.9 + 0.02)


# Generators, devices, errors


def rand_augment(images: torch.Tensor, spec: str, g: torch.Generator, *fill: tuple) -> torch.Tensor:
    """As a run with this spec draws and applies it."""
    return augment.rand_augment(images, draws.operations(len(images), augment.parse(spec), g), *fill)


def pipeline(images: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    run = Run(crop_padding=4, rand_augment=SPEC, mixup=0.8)
    drawn = device.send(draws.of_step(run, len(images), [], generator(seed)), str(images.device))
    x = augment.flip(augment.crop(images, drawn.crop, 4), drawn.flip)
    x = augment.normalize(augment.rand_augment(x, drawn.operations), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    return augment.mixup(x, torch.arange(len(x), device=x.device), 100, drawn.lam, 0.1)


def test_result_depends_on_the_generator_and_on_nothing_else(photos):
    images = photos[32, 32]
    before = images.clone()
    torch.manual_seed(0)
    np.random.seed(0)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), auto_augment.random.getstate()
    first, again, other = pipeline(images, 5), pipeline(images, 5), pipeline(images, 6)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0]) and not torch.equal(first[1], other[1])
    assert torch.equal(torch.get_rng_state(), states[0]) and (np.random.get_state()[1] == states[1]).all()
    assert auto_augment.random.getstate() == states[2]
    assert torch.equal(images, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_gives_what_the_cpu_gives(photos):
    images = photos[32, 32]
    for mine, cpus in zip(pipeline(images.cuda(), 5), pipeline(images, 5), strict=True):
        assert mine.is_cuda
        assert ((mine.cpu() - cpus).abs() > 0.03).float().mean() < 1e-3


def test_empty_batch_and_single_image(photos):
    for count in (0, 1):
        images, targets = pipeline(photos[24, 40][:count], 0)
        assert images.shape == (count, 3, 24, 40) and targets.shape == (count, 100)


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("rand-m9-p0.5", "p0.5"),
        ("rand-m9-tweights", "tweights"),
        ("rand-m9-mmax10", "mmax10"),
        ("rand-inc2", "inc2"),
        ("rand-n0", "n0"),
        ("rand-n1.5", "n1.5"),
        ("rand-m", "'m'"),
        ("rand-m-9", "'m'"),
        ("rand-mstdinf", "mstdinf"),
        ("rand-mstd101", "mstd"),
        ("rand-", "''"),
        ("augmix-m3", "augmix"),
        ("", "rand"),
    ],
)
def test_unknown_spec_is_named(spec, named):
    with pytest.raises(ValueError, match=named):
        augment.parse(spec)


def test_spec_is_read_in_any_order():
    assert augment.parse("rand-n3-inc1-mstd0.25-m7.5") == (7.5, 0.25, True, 3)
    assert augment.parse("rand") == (10, 0, False, 2)


def test_wrong_arguments_are_refused(photos):
    images, none = photos[8, 8], torch.zeros(len(photos[8, 8]), dtype=torch.bool)
    for function, arguments in [
        (augment.crop, (none.long().expand(2, -1), 4)),
        (augment.flip, (none,)),
        (augment.rand_augment, ([],)),
        (augment.normalize, ((0.5,) * 3, (0.5,) * 3)),
    ]:
        with pytest.raises(TypeError, match="uint8"):
            function(images.float(), *arguments)
        with pytest.raises(ValueError, match="B, C, H, W"):
            function(images[0], *arguments)
    with pytest.raises(ValueError, match="-1"):
        augment.crop(images, none.long().expand(2, -1), -1)
    nothing = draws.operations(len(images), augment.parse("rand-m9"), generator())
    with pytest.raises(ValueError, match="3 channels"):
        augment.rand_augment(images[:, :1], nothing)
    with pytest.raises(ValueError, match="3 channels"):
        augment.rand_augment(images, nothing, fill=(1, 2))
    with pytest.raises(ValueError, match="3 numbers"):
        augment.normalize(images, (0.5,), (0.5,) * 3)
    floats, labels = images.float(), torch.zeros(len(images), dtype=torch.long)
    with pytest.raises(TypeError, match="floating"):
        augment.mixup(images, labels, 10, 0.8, 0.1)
    with pytest.raises(ValueError, match="labels"):
        augment.mixup(floats, labels[1:], 10, 0.8, 0.1)
    for lam, smoothing in [(-0.1, 0.1), (1.1, 0.1), (float("nan"), 0.1), (0.8, 1.0), (0.8, -0.1)]:
        with pytest.raises(ValueError, match="lam"):
            augment.mixup(floats, labels, 10, lam, smoothing)
    with pytest.raises(RuntimeError):
        augment.mixup(floats, labels + 10, 10, 0.8, 0.1)
