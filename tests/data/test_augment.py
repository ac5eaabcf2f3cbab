"""Augmentations as data: distributions against timm's and torchvision's own transforms, purity, what is applied."""

import math
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from image_fixtures import make_folder, picture
from loading import take, train_loader
from PIL import Image
from timm.data import Mixup
from timm.data import auto_augment as timm_aa
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import ColorJitter, RandomResizedCrop, TrivialAugmentWide

from scalekd_ds.config import DataConfig
from scalekd_ds.data import augment
from scalekd_ds.data.mix import Mixer
from scalekd_ds.data.policy import Op, Policy, apply_ops, draw_erasing_box
from scalekd_ds.data.sources.image_folder import index_folder
from scalekd_ds.errors import UserError

HPARAMS = {"translate_const": 250, "img_mean": (128, 128, 128)}
POLICIES = ["rand-m9-n2-mstd0.5-inc1", "rand-m7-n2-mstd0.5", "rand-m5-n3-mstd101-inc1-p0.8", "original-mstd0.5", "v0"]


def timms_calls(name, count, monkeypatch):
    """(operation, arguments) of `count` images by timm's own transform."""
    random.seed(0), np.random.seed(0)
    calls = []
    names = {}
    for op in timm_aa.NAME_TO_OP:
        names.setdefault(timm_aa.NAME_TO_OP[op], op)
    build = timm_aa.rand_augment_transform if name.startswith("rand") else timm_aa.auto_augment_transform
    transform = build(name, dict(HPARAMS))
    ops = transform.ops if name.startswith("rand") else [o for part in transform.policy for o in part]
    for op in ops:
        monkeypatch.setattr(op, "aug_fn", lambda img, *a, _n=op.name, **k: calls.append((_n, a)) or img)
    image = Image.new("RGB", (8, 8))
    for _ in range(count):
        transform(image)
    return calls


@pytest.mark.parametrize("name", POLICIES)
def test_draws_are_distributed_as_timms(name, monkeypatch):
    count = 20000
    theirs = timms_calls(name, count, monkeypatch)
    policy, rng = Policy(name), np.random.default_rng(1)
    ours = [(op.name, op.arguments) for _ in range(count) for op in policy.draw(rng)]
    # counts of each operation within five standard deviations of each other
    a, b = Counter(n for n, _ in ours), Counter(n for n, _ in theirs)
    assert a.keys() == b.keys()
    for operation in a:
        assert abs(a[operation] - b[operation]) < 5 * math.sqrt(a[operation] + b[operation]), operation
        x, y = (np.array([v[0] for n, v in drawn if n == operation and v]) for drawn in (ours, theirs))
        assert len(x) == 0 or len(y) > 0
        if len(x):
            spread = 5 * math.sqrt(x.var() / len(x) + y.var() / len(y)) + 1e-9
            assert abs(x.mean() - y.mean()) < spread, operation
            assert x.std() == pytest.approx(y.std(), rel=0.1, abs=1e-6), operation
            assert x.min() == pytest.approx(y.min(), rel=0.1, abs=0.05 * (y.max() - y.min()) + 1e-6), operation
            assert x.max() == pytest.approx(y.max(), rel=0.1, abs=0.05 * (y.max() - y.min()) + 1e-6), operation


def test_trivial_augments_draws_are_distributed_as_torchvisions(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "torchvision.transforms.autoaugment._apply_op",
        lambda img, name, magnitude, interpolation, fill: calls.append((name, magnitude)) or img,
    )
    torch.manual_seed(0)
    transform, image = TrivialAugmentWide(), Image.new("RGB", (8, 8))
    count = 20000
    for _ in range(count):
        transform(image)
    rng, policy = np.random.default_rng(0), Policy("trivial")
    drawn = [op for _ in range(count) for op in policy.draw(rng)]
    theirs, ours = Counter(n for n, _ in calls), Counter(op.name for op in drawn)
    assert count - len(drawn) == pytest.approx(theirs["Identity"], abs=5 * math.sqrt(2 * count / 14))
    for name in ours:
        assert ours[name] == pytest.approx(theirs[name], abs=5 * math.sqrt(2 * count / 14))
        values = np.array([m for n, m in calls if n == name])
        mine = np.array([op.arguments[0] for op in drawn if op.name == name and op.arguments])
        if len(mine):
            shift = 1.0 if name in ("Brightness", "Color", "Contrast", "Sharpness") else 0.0
            spread = values.max() - values.min()
            assert mine.mean() - shift == pytest.approx(values.mean(), abs=0.05 * spread), name
            assert mine.min() - shift == pytest.approx(values.min(), abs=0.05 * spread), name
            assert mine.max() - shift == pytest.approx(values.max(), abs=0.05 * spread), name


def test_colour_jitters_draws_are_distributed_as_torchvisions():
    rng, policy = np.random.default_rng(0), Policy("", (0.4, 0.3, 0.2))
    drawn = [policy.draw(rng) for _ in range(5000)]
    torch.manual_seed(0)
    orders, ranges = Counter(), {n: [] for n in ("Brightness", "Contrast", "Color")}
    for ops in drawn:
        orders[tuple(op.name for op in ops)] += 1
        for op in ops:
            ranges[op.name].append(op.arguments[0])
    theirs = [ColorJitter.get_params((0.6, 1.4), (0.7, 1.3), (0.8, 1.2), None) for _ in range(5000)]
    assert len(orders) == 6 and min(orders.values()) > 5000 / 6 * 0.85
    for place, name in enumerate(ranges, 1):
        x, y = np.array(ranges[name]), np.array([params[place] for params in theirs])
        assert x.mean() == pytest.approx(y.mean(), abs=0.02)
        assert x.std() == pytest.approx(y.std(), rel=0.05)


def test_crops_are_distributed_as_torchvisions():
    height, width, scale, ratio, count = 300, 500, (0.08, 1.0), (3 / 4, 4 / 3), 4000
    ours = np.array(
        [augment.random_resized_crop(augment.generator(0, 0, i), height, width, scale, ratio) for i in range(count)]
    )
    blank = Image.new("RGB", (width, height))
    torch.manual_seed(0)
    theirs = np.array([RandomResizedCrop.get_params(blank, scale, ratio) for _ in range(count)])

    def moments(boxes):
        y, x, h, w = boxes.T.astype(np.float64)
        area, aspect = h * w / (height * width), np.log(w / h)
        free_y, free_x = np.maximum(height - h, 1), np.maximum(width - w, 1)
        return np.array(
            [area.mean(), area.std(), aspect.mean(), aspect.std(), (y / free_y).mean(), (x / free_x).mean()]
        )

    # the standard error of the means is below 0.005 at 4,000 draws
    assert np.abs(moments(ours) - moments(theirs)).max() < 0.02
    assert (ours[:, 0] + ours[:, 2] <= height).all() and (ours[:, 1] + ours[:, 3] <= width).all()


def test_uniform_draws_are_uniform_and_independent():
    indices = np.arange(100_000)
    draws = augment.uniform(3, np.zeros_like(indices), indices, 1)
    histogram = np.histogram(draws, 20, (0, 1))[0]
    # chi-squared with 19 degrees of freedom: 43.8 is its 0.1% tail
    assert ((histogram - 5000) ** 2 / 5000).sum() < 43.8
    for other in (
        augment.uniform(3, np.ones_like(indices), indices, 1),
        augment.uniform(4, np.zeros_like(indices), indices, 1),
        augment.uniform(3, np.zeros_like(indices), indices, 2),
        np.roll(draws, 1),
    ):
        assert abs(np.corrcoef(draws, other)[0, 1]) < 0.01


@pytest.mark.parametrize(
    "name", ["Rotate", "ShearX", "TranslateYRel", "PosterizeIncreasing", "ColorIncreasing", "Equalize"]
)
def test_operations_are_timms_own(name):
    image = np.asarray(picture(np.random.default_rng(0), 40, 48))
    arguments = {"Equalize": (), "PosterizeIncreasing": (2,), "ColorIncreasing": (1.6,)}.get(name, (0.2,))
    fill = (1, 2, 3)
    ours = apply_ops(image, [Op(name, arguments), Op("Invert")], fill)
    picture_ = timm_aa.NAME_TO_OP[name](
        Image.fromarray(image), *arguments, fillcolor=fill, resample=Image.Resampling.BICUBIC
    )
    assert np.array_equal(ours, 255 - np.asarray(picture_))


def test_posterize_to_no_bits_is_black():
    image = np.asarray(picture(np.random.default_rng(0), 8, 8))
    assert apply_ops(image, [Op("PosterizeIncreasing", (0,))], (0, 0, 0)).max() == 0


def test_erased_boxes_are_distributed_as_timms():
    rng, side, count = np.random.default_rng(0), 64, 4000
    boxes = [draw_erasing_box(rng, side, 0.25) for _ in range(count)]
    random.seed(0)
    transform = RandomErasing(0.25, mode="const", device="cpu")
    theirs = []
    for _ in range(count):
        image = torch.ones(1, side, side)
        transform(image)
        if (image == 0).any():
            rows, columns = (image[0] == 0).any(1).nonzero(), (image[0] == 0).any(0).nonzero()
            theirs.append((rows[0].item(), columns[0].item(), len(rows), len(columns)))
    ours = [box for box in boxes if box]
    assert len(ours) == pytest.approx(len(theirs), abs=5 * math.sqrt(2 * len(theirs)))
    for place in range(4):
        x, y = (np.array([box[place] for box in group], dtype=float) for group in (ours, theirs))
        assert abs(x.mean() - y.mean()) < 5 * math.sqrt(x.var() / len(x) + y.var() / len(y))
        assert x.std() == pytest.approx(y.std(), rel=0.1)


@pytest.mark.parametrize("name", ["rand", "original", "rand-m9-x3", "nothing-m9", "rand-m9-tweights", "3a"])
def test_a_policy_that_is_unknown_is_refused_by_name(name):
    if name == "rand" or name == "original":
        assert Policy(name).name == name
        return
    with pytest.raises(UserError, match=r"data\.auto_augment is"):
        Policy(name)


def loader(source, cfg):
    return train_loader(source, cfg, micro=6, pixels=((0.5,) * 3, (0.25,) * 3))


@pytest.fixture
def source(tmp_path):
    make_folder(tmp_path, {"a": 9, "b": 9})
    return index_folder(tmp_path, "data.train")


@pytest.mark.parametrize("threads", [1, 3])
def test_batches_are_pure_functions_of_the_step(source, threads):
    cfg = DataConfig(image_size=24, auto_augment="rand-m9-n2-mstd0.5-inc1", random_erasing=0.5, threads=threads)
    whole = take(loader(source, cfg), 8)
    later = loader(source, replace(cfg, threads=2))
    later.start_step = 5
    for (x, a), (y, b) in zip(whole[5:], take(later, 3), strict=True):
        assert torch.equal(x, y) and torch.equal(a, b)
    # another epoch draws anew
    assert len({x.sum().item() for x, _ in whole}) == 8
    assert whole[0][0].is_contiguous(memory_format=torch.channels_last)


def test_a_policy_that_draws_nothing_leaves_the_plain_pixels(source):
    plain, never = DataConfig(image_size=24), DataConfig(image_size=24, auto_augment="rand-m9-n2-p0.0")
    for (x, a), (y, b) in zip(take(loader(source, never), 3), take(loader(source, plain), 3), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5)
        assert torch.equal(a, b)


def test_erased_boxes_are_zero_or_noise(source):
    cfg = {"image_size": 24, "random_erasing": 1.0, "random_crop": False, "hflip": 0.0}
    bare = DataConfig(image_size=24, random_crop=False, hflip=0.0)
    plain, zero, noise = (
        take(loader(source, c), 1)[0][0]
        for c in (bare, DataConfig(**cfg, erasing_fill="zero"), DataConfig(**cfg, erasing_fill="noise"))
    )
    for a, b, c in zip(plain, zero, noise, strict=True):
        erased = (b == 0).all(0)
        assert 0.01 < erased.float().mean() < 0.4
        assert torch.equal(a[:, ~erased], b[:, ~erased]) and torch.equal(a[:, ~erased], c[:, ~erased])
        assert c[:, erased].std() == pytest.approx(1.0, abs=0.4)


@pytest.mark.parametrize("options", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 1.0}])
def test_mixing_is_timms_and_pure(options):
    images, labels = torch.randn(8, 3, 16, 16), torch.arange(8) % 5
    mixer = Mixer(DataConfig(**options), 5, 8, seed=3, rank=0)
    before = np.random.get_state()[1].copy()
    mixed, targets = mixer(images.clone(), labels, 7, 1)
    assert np.array_equal(np.random.get_state()[1], before)
    again, _ = mixer(images.clone(), labels, 7, 1)
    assert torch.equal(mixed, again)
    other = Mixer(DataConfig(**options), 5, 8, seed=3, rank=1)(images.clone(), labels, 7, 1)[0]
    assert not torch.equal(mixed, other) and not torch.equal(mixed, mixer(images.clone(), labels, 8, 1)[0])
    assert targets.shape == (8, 5)
    torch.testing.assert_close(targets.sum(1), torch.ones(8))
    timm = Mixup(options.get("mixup", 0.0), options.get("cutmix", 0.0), label_smoothing=0.0, num_classes=5)
    np.random.seed([3, 0, 7, 1, 0x313])
    theirs, their_targets = timm(images.clone(), labels)
    torch.testing.assert_close((mixed, targets), (theirs, their_targets))


def test_mixing_refuses_an_odd_batch():
    with pytest.raises(UserError, match="the micro batch has 7 images"):
        Mixer(DataConfig(mixup=0.5), 5, 7, 0, 0)
