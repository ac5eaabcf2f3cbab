"""Mixup and cutmix by view: which image a view is mixed with, and how, is a pure function of (seed, view, sample).

Image i of view v is `share * view(i, v) + (1 - share) * view(partner, v)`, both with their own augmentations; cutmix takes
a box of the partner's. Unlike timm's mixing of a batch, it does not depend on the batch that the image is in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from scalekd_ds.config import DataConfig
from scalekd_ds.data import augment

# keeps these draws apart from others that are made with the same seed
_STREAM = 0x3171E


class Mix(NamedTuple):
    """How an image of a view is mixed.

    Attributes:
        partner: Index of the other image in the source.
        share: Share of the image itself in its soft target.
        box: (y, x, h, w) in pixels in which the partner shows: for mixup the whole image.
        weight: Weight of the image itself within that box; the partner's is 1 - weight.
    """

    partner: int
    share: float
    box: tuple[int, int, int, int]
    weight: float


class Mixes(NamedTuple):
    """How a batch is mixed, M of whose images have a partner.

    Attributes:
        table: (M, 5) int64: the image's place in the batch in rising order, then y, x, h and w of the box in pixels.
        weights: (M,) float32, the weight of the image itself within the box.
    """

    table: torch.Tensor
    weights: torch.Tensor


def mixes_by_view(cfg: DataConfig) -> bool:
    """Whether images are mixed by view at all."""
    return cfg.mix_by == "view" and (cfg.mixup > 0 or cfg.cutmix > 0)


def draw_mix(cfg: DataConfig, seed: int, view: int, index: int, size: int) -> Mix | None:
    """Draws how view `view` of sample `index` is mixed; None where it is not.

    Args:
        cfg: `mixup`, `cutmix`, `mix_probability`, `image_size`.
        seed: Seed of the views.
        view: Number of the view.
        index: Index of the sample in the source.
        size: Images in the source, at least two.
    """
    rng = augment.generator(seed, view, index, _STREAM)
    if rng.random() >= cfg.mix_probability:
        return None
    partner = int(rng.integers(size - 1))
    partner += partner >= index
    cuts = cfg.cutmix > 0 and (cfg.mixup == 0 or rng.random() < 0.5)
    alpha = cfg.cutmix if cuts else cfg.mixup
    # in single precision, in which images and targets are mixed
    share = float(np.float32(rng.beta(alpha, alpha)))
    side = cfg.image_size
    if not cuts:
        return Mix(partner, share, (0, 0, side, side), share)
    box = _draw_box(rng, side, share)
    return Mix(partner, 1.0 - box[2] * box[3] / side**2, box, 0.0)


def _draw_box(rng: np.random.Generator, side: int, share: float) -> tuple[int, int, int, int]:
    """Draws cutmix's box, (y, x, h, w) in pixels, as timm does: a square around any pixel, cut at the image's edge."""
    cut = int(side * np.sqrt(1.0 - share))
    starts, lengths = [], []
    for centre in rng.integers(side, size=2).tolist():
        low, high = max(0, centre - cut // 2), min(side, centre + (cut + 1) // 2)
        starts.append(low)
        lengths.append(high - low)
    return starts[0], starts[1], lengths[0], lengths[1]


def soft_targets(labels: np.ndarray, mixes: Sequence[Mix | None], num_classes: int) -> torch.Tensor:
    """Targets of a batch in the proportion of its images.

    Args:
        labels: (B + M,) classes of the samples, and behind them of the partners of those that are mixed.
        mixes: How each of the B samples is mixed, or None.
        num_classes: K.

    Returns:
        (B, K) float32, rows that sum to 1.
    """
    count = len(mixes)
    shares = np.array([1.0 if mix is None else mix.share for mix in mixes], dtype=np.float32)
    targets = np.zeros((count, num_classes), dtype=np.float32)
    targets[np.arange(count), labels[:count]] = shares
    places = np.array([place for place, mix in enumerate(mixes) if mix is not None], dtype=np.int64)
    targets[places, labels[count:]] += np.float32(1.0) - shares[places]
    return torch.from_numpy(targets)


def pack_mixes(
    mixes: Sequence[Mix | None], pinned: Callable[[torch.Tensor], torch.Tensor] = lambda values: values
) -> Mixes | None:
    """How a batch is mixed, for its device; None where no image of it is.

    Args:
        mixes: How each image is mixed, or None.
        pinned: Moves values to where a GPU copies them from.
    """
    found = [(place, mix) for place, mix in enumerate(mixes) if mix is not None]
    if not found:
        return None
    table = torch.tensor([(place, *mix.box) for place, mix in found])
    return Mixes(pinned(table), pinned(torch.tensor([mix.weight for _, mix in found], dtype=torch.float32)))


def mix_images(images: torch.Tensor, mixes: Mixes) -> torch.Tensor:
    """Mixes images in place, whose bits do not depend on the others of the batch.

    Args:
        images: (B + M, 3, S, S) float32: the batch, and behind it the partners in the order of the table, which are
            overwritten.
        mixes: On the device of the images.

    Returns:
        The first B of the images.
    """
    samples, partners = images.split([len(images) - len(mixes.table), len(mixes.table)])
    (_mix_by_mask if images.device.type == "cuda" else _mix_one_by_one)(samples, partners, mixes)
    return samples


def _mix_one_by_one(samples: torch.Tensor, partners: torch.Tensor, mixes: Mixes) -> None:
    """The way of a CPU, which touches no pixel outside of the boxes."""
    rests = 1.0 - mixes.weights
    rows = zip(mixes.table.tolist(), mixes.weights.tolist(), rests.tolist(), partners, strict=True)
    for (place, y, x, h, w), weight, rest, partner in rows:
        box, other = samples[place, :, y : y + h, x : x + w], partner[:, y : y + h, x : x + w]
        if weight == 0.0:
            box.copy_(other)
        else:
            # two products and a sum, each rounded: a fused one would round otherwise in a part of the image
            box.mul_(weight).add_(other.mul_(rest))


def _mix_by_mask(samples: torch.Tensor, partners: torch.Tensor, mixes: Mixes) -> None:
    """The way of a GPU: a fixed number of kernels whatever the batch, and no size that the host would wait for."""
    place, y, x, h, w = mixes.table.unbind(1)
    steps = torch.arange(samples.shape[-1], device=samples.device)

    def within(first: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        return (steps >= first[:, None]) & (steps < (first + length)[:, None])

    inside = within(y, h)[:, None, :, None] & within(x, w)[:, None, None, :]
    weights = torch.where(inside, mixes.weights[:, None, None, None], 1.0)
    mixed = samples.index_select(0, place).mul_(weights).add_(partners.mul_(1.0 - weights))
    samples.index_copy_(0, place, mixed)
