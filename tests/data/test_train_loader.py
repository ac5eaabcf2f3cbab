"""Training batches: the drawn crop and flip of each image, the same ones after a resume and on any number of ranks."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from loading import take, train_loader
from PIL import Image

from scalekd_ds.config import DataConfig
from scalekd_ds.data import StreamSampler, augment


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_training_pixels_are_the_drawn_crop_and_flip(source, interpolation):
    cfg = DataConfig(image_size=64, crop_scale=(0.3, 1.0), interpolation=interpolation)
    images, labels = take(train_loader(source, cfg, micro=12, seed=5), 1)[0]
    indices, epochs = StreamSampler(12, 5, 12, 12, 0, 1).indices(0, 0)
    flips = augment.uniform(5, epochs, indices, 1) < 0.5
    assert 0 < flips.sum() < 12
    for ours, label, index, epoch, flip in zip(images, labels, indices, epochs, flips, strict=True):
        with Image.open(source.paths[index]) as image:
            rng = augment.generator(5, int(epoch), int(index))
            y, x, h, w = augment.random_resized_crop(rng, image.height, image.width, cfg.crop_scale, cfg.crop_ratio)
            expected = (
                image.convert("RGB")
                .crop((x, y, x + w, y + h))
                .resize((64, 64), Image.Resampling[interpolation.upper()])
            )
        expected = np.asarray(expected, dtype=np.float32).transpose(2, 0, 1)
        expected = expected[:, :, ::-1] if flip else expected
        difference = np.abs(ours.numpy() - expected)
        assert difference.mean() < 0.3 and difference.max() <= 4, (difference.mean(), difference.max())
        assert label == source.labels[index]


def test_pixels_are_normalised_floats_and_labels_are_int64(source):
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)
    cfg = DataConfig(image_size=32)
    (raw, labels), (ours, _) = (
        take(train_loader(source, cfg, **pixels), 1)[0] for pixels in ({}, {"pixels": (mean, std)})
    )
    expected = (raw / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert torch.allclose(ours, expected, atol=1e-4)
    assert ours.dtype == torch.float32 and labels.dtype == torch.int64


def test_resuming_is_bit_identical(source):
    cfg = DataConfig(image_size=48)
    whole = take(train_loader(source, cfg), 9)
    rest = take(train_loader(source, cfg, start_step=5), 4)
    for (images, labels), (images_again, labels_again) in zip(whole[5:], rest, strict=True):
        assert torch.equal(images, images_again)
        assert torch.equal(labels, labels_again)


def test_resuming_inside_an_accumulated_step_starts_at_its_first_micro_batch(source):
    cfg = DataConfig(image_size=48)
    whole = take(train_loader(source, cfg, micro=2, batch=4), 8)
    rest = take(train_loader(source, cfg, micro=2, batch=4, start_step=2), 4)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(whole[4:], rest, strict=True))


def test_two_ranks_together_get_the_batches_of_one(source):
    cfg = DataConfig(image_size=48)
    one = take(train_loader(source, cfg, micro=4), 4)
    two = [take(train_loader(source, cfg, micro=2, rank=rank, world_size=2), 4) for rank in range(2)]
    for step in range(4):
        assert torch.equal(one[step][0], torch.cat([two[0][step][0], two[1][step][0]]))


def test_every_epoch_draws_new_crops(source):
    cfg = DataConfig(image_size=48, hflip=0.0)
    batches = take(train_loader(source, cfg, micro=12), 2)
    order = [StreamSampler(12, 0, 12, 12, 0, 1).indices(step, 0)[0] for step in range(2)]
    first, second = (batch[0][np.argsort(o)] for batch, o in zip(batches, order, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_prefetch_depths_do_not_change_the_batches(source):
    cfg = DataConfig(image_size=32)
    one, four = (take(train_loader(source, replace(cfg, prefetch=depth)), 5) for depth in (1, 4))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(one, four, strict=True))
