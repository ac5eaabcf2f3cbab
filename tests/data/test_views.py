"""Views: the images of a view are the same bits in any batch, on any rank and in any epoch, and come again."""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from image_fixtures import make_folder
from loading import CPU, RAW, take, train_loader

from scalekd_ds.config import DataConfig
from scalekd_ds.data import StreamSampler, TrainLoader
from scalekd_ds.data.sources.image_folder import index_folder
from scalekd_ds.errors import UserError

PIXELS = ((0.4, 0.5, 0.6), (0.2, 0.3, 0.1))
MIXED = {"mixup": 0.8, "cutmix": 1.0, "mix_by": "view", "mix_probability": 0.8}
ERASED = {"random_erasing": 0.5}
# with and without work on the host after DALI
WAYS = {
    "everything": {
        "auto_augment": "rand-m9-n2-mstd0.5-inc1",
        "color_jitter": (0.4, 0.4, 0.4),
        "interpolation": "bicubic",
        **ERASED,
        **MIXED,
    },
    "crop": {**MIXED},
    "no crop": {"random_crop": False, **ERASED, **MIXED},
    "policy without crop": {"random_crop": False, "auto_augment": "trivial", **MIXED},
}


def loader(source, cfg, micro, rank=0, world=1, seed=0, batch=None, pixels=PIXELS, **options):
    given = {"views": cfg.views, "view_seed": cfg.view_seed, "repeats": cfg.repeats}
    sampler = StreamSampler(len(source), seed, batch or micro * world, micro, rank, world, **given)
    return TrainLoader(source, cfg, sampler, CPU, *pixels, **options)


def by_view(source, cfg, samples, micro, world=1, batch=None, **options):
    """(sample, view) -> every (image, target) that came of it in the first `samples` of the stream."""
    found = defaultdict(list)
    for rank in range(world):
        batches = loader(source, cfg, micro, rank, world, batch=batch, **options)
        accumulation = batches.sampler.accumulation
        for number, (images, targets) in enumerate(take(batches, samples // (micro * world))):
            indices, views = batches.sampler.indices(*divmod(number, accumulation))
            for index, view, *each in zip(indices.tolist(), views.tolist(), images, targets, strict=True):
                found[index, view].append(each)
    return found


@pytest.mark.parametrize("way", WAYS)
def test_a_view_is_the_same_bits_in_any_batch_on_any_rank_and_in_any_epoch(source, way):
    cfg = DataConfig(image_size=32, views=2, view_seed=7, **WAYS[way])
    # four epochs: each view twice
    whole = by_view(source, cfg, 48, micro=12)
    assert len(whole) == 24 and all(len(each) == 2 for each in whole.values())
    for split in ({"micro": 1}, {"micro": 3, "batch": 6}, {"micro": 4, "world": 3}):
        other = by_view(source, cfg, 48, seed=11, **split)
        for key, given in whole.items():
            for image, target in given[1:] + other[key]:
                assert torch.equal(image, given[0][0]) and torch.equal(target, given[0][1]), (key, split)
    assert not any(torch.equal(whole[i, 0][0][0], whole[i, 1][0][0]) for i in range(12))


def test_views_are_numbered_by_pass_and_come_again():
    new, again = (StreamSampler(10, 3, 20, 20, 0, 1, repeats=2, views=views) for views in (None, 3))
    for step in range(8):
        indices, passes = new.indices(step, 0)
        assert set(passes.tolist()) == {2 * step, 2 * step + 1}
        for ours, theirs in zip(again.indices(step, 0), (indices, passes % 3), strict=True):
            assert np.array_equal(ours, theirs)


def test_the_seed_of_the_views_leaves_the_order_as_it_is(source):
    cfg = DataConfig(image_size=16, random_erasing=0.5)
    plain, same, other = (
        take(loader(source, replace(cfg, view_seed=seed), 6, seed=5, pixels=RAW), 3) for seed in (None, 5, 6)
    )
    # what there was before there were views
    for (images, labels), (images_again, labels_again) in zip(
        plain, take(train_loader(source, cfg, micro=6, seed=5), 3), strict=True
    ):
        assert torch.equal(images, images_again) and torch.equal(labels, labels_again)
    for a, b, c in zip(plain, same, other, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], c[1]) and not torch.equal(a[0], c[0])
    # and the order may change without the views
    one, two = (by_view(source, replace(cfg, view_seed=5), 12, micro=6, seed=seed) for seed in (1, 2))
    assert list(one) != list(two)
    for key, ((image, label),) in one.items():
        assert torch.equal(image, two[key][0][0]) and label == two[key][0][1]


def test_what_replaces_a_bad_file_follows_from_the_seed_of_the_views(tmp_path):
    source = index_folder(make_folder(tmp_path, {"a": 12}), "data.train")
    for bad in (1, 2, 6):
        Path(source.paths[bad]).write_bytes(b"")
    cfg = DataConfig(image_size=16, max_bad_share=0.5)
    one, two, other = (
        by_view(source, replace(cfg, view_seed=view_seed), 36, micro=12, seed=seed)
        for seed, view_seed in ((1, 5), (2, 5), (1, 6))
    )
    # with the same augmentations, unless the two are different images
    for key, ((image, _),) in one.items():
        assert torch.equal(image, two[key][0][0]), key
    assert not any(torch.equal(one[key][0][0], other[key][0][0]) for key in one)


def test_images_are_handed_over_in_the_normalisation_of_who_sees_them(source):
    cfg = DataConfig(image_size=32, **WAYS["everything"])
    seen = ((0.1, 0.2, 0.3), (0.3, 0.2, 0.4))
    for options in (WAYS["everything"], WAYS["no crop"]):
        cfg = DataConfig(image_size=32, **options)
        (plain, targets), (ours, targets_too) = (
            take(loader(source, cfg, 12, **given), 1)[0] for given in ({}, {"seen": seen})
        )
        mean, std, new_mean, new_std = (torch.tensor(each)[:, None, None] for each in (*PIXELS, *seen))
        expected = (plain * std + mean - new_mean) / new_std
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-5)
        assert torch.equal(targets, targets_too) and not torch.equal(ours, plain)


@pytest.mark.parametrize(("name", "value", "need"), [("views", 0, "at least 1"), ("view_seed", 2**62, "62 bits")])
def test_what_no_view_can_be_made_of_is_refused(name, value, need):
    with pytest.raises(UserError, match=rf"data\.{name} is {value}: it must be .*{need}"):
        DataConfig(**{name: value})
