"""Operations that give each level of a channel another one, by a table for each image.

Tables of AutoContrast, Equalize and Contrast depend on the image's histogram or mean, and are made on the device.
"""

from __future__ import annotations

import torch

from scalekd_ds.data.on_device.luma import luma
from scalekd_ds.data.on_device.plan import Points


def map_levels(images: torch.Tensor, step: Points) -> None:
    """Applies a step to images (B, S, S, 3) uint8, in place."""
    chosen = images.index_select(0, step.images)
    count = len(chosen)
    # where the level of a pixel is in the tables of all images and channels
    first = torch.arange(0, 256 * 3 * count, 256, device=images.device).view(count, 1, 1, 3)
    slots = chosen.long().add_(first)
    tables = []
    if measured := step.autocontrast + step.equalize:
        # integers add up to the same in any order
        one = torch.ones(1, dtype=torch.int32, device=images.device)
        found = slots[:measured].flatten()
        counts = torch.zeros(measured * 3 * 256, dtype=torch.int32, device=images.device)
        counts = counts.scatter_add_(0, found, one.expand(len(found))).view(measured, 3, 256)
        if step.autocontrast:
            tables.append(_stretched(counts[: step.autocontrast]))
        if step.equalize:
            tables.append(_equalized(counts[step.autocontrast :]))
    if len(step.contrast):
        tables.append(_around_the_mean(chosen[measured : measured + len(step.contrast)], step.contrast))
    if len(step.tables):
        tables.append(step.tables[:, None].expand(-1, 3, -1))
    table = torch.cat(tables) if len(tables) > 1 else tables[0]
    images.index_copy_(0, step.images, table.flatten()[slots])


def _stretched(counts: torch.Tensor) -> torch.Tensor:
    """Tables (K, 3, 256) uint8 that stretch a channel's levels to 0 to 255, from the pixels with each level."""
    levels = torch.arange(256, device=counts.device)
    seen = counts > 0
    low = torch.where(seen, levels, 255).amin(-1, keepdim=True)
    high = torch.where(seen, levels, 0).amax(-1, keepdim=True)
    # a channel of one level is left as it is; the quotient is not used there. A number over a tensor would be the number
    # times a rounded reciprocal
    scale = torch.full_like(low, 255, dtype=torch.float64).div_(high - low)
    stretched = (levels * scale).add_(-low * scale).clamp_(0.0, 255.0)
    return torch.where(high > low, stretched, levels.double()).byte()


def _equalized(counts: torch.Tensor) -> torch.Tensor:
    """Tables (K, 3, 256) uint8 after which the levels of a channel are equally frequent, from the pixels with each."""
    levels = torch.arange(256, device=counts.device)
    below = counts.cumsum(-1)
    last = torch.where(counts > 0, levels, 0).amax(-1, keepdim=True)
    step = (below[..., -1:] - counts.gather(-1, last)).div_(255, rounding_mode="floor")
    below = below.sub_(counts).add_(step.div(2, rounding_mode="floor"))
    equalized = below.div_(step.clamp(min=1), rounding_mode="floor").clamp_(max=255)
    # of a channel with one level, or few pixels, nothing can be spread
    return torch.where(step > 0, equalized, levels).byte()


def _around_the_mean(chosen: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Tables (K, 3, 256) uint8 that move levels away from an image's mean grey value, or towards it, by a factor."""
    grey = luma(chosen.int()).flatten(1)
    # rounded to the nearest whole number
    mean = grey.sum(1).mul_(2).add_(grey.shape[1]).div_(2 * grey.shape[1], rounding_mode="floor").float()[:, None]
    levels = torch.arange(256, device=chosen.device)
    # a product and a sum of their own, since one rounding less would give other levels
    moved = (levels - mean).mul_(factors[:, None]).add_(mean).clamp_(0.0, 255.0)
    return moved.byte()[:, None].expand(-1, 3, -1)
