"""Colour and sharpness, which are blends of an image with a version of it, and Gaussian blur."""

from __future__ import annotations

import torch

from scalekd_ds.data.on_device.luma import luma
from scalekd_ds.data.on_device.plan import Blends, Blurs


def blend(images: torch.Tensor, step: Blends) -> None:
    """Applies Color and Sharpness to images (B, S, S, 3) uint8, in place."""
    chosen = images.index_select(0, step.images)
    versions = []
    if step.colour:
        versions.append(luma(chosen[: step.colour].int())[..., None].expand(-1, -1, -1, 3))
    if step.colour < len(chosen):
        versions.append(_smoothed(chosen[step.colour :].int()))
    version = torch.cat(versions) if len(versions) > 1 else versions[0]
    # a product and a sum of their own in single precision, as Pillow rounds
    blended = (chosen - version).float().mul_(step.factors[:, None, None, None]).add_(version).clamp_(0.0, 255.0)
    images.index_copy_(0, step.images, blended.byte())


def _smoothed(pixels: torch.Tensor) -> torch.Tensor:
    """Pillow's SMOOTH of (K, S, S, 3) int32: weights 5 and 8 times 1, over 13; pixels at the edge stay as they are."""
    rows = pixels[:, :-2] + pixels[:, 1:-1] + pixels[:, 2:]
    total = (rows[:, :, :-2] + rows[:, :, 1:-1]).add_(rows[:, :, 2:]).add_(pixels[:, 1:-1, 1:-1], alpha=4)
    smoothed = pixels.clone()
    # the quotient by 13, rounded to the nearest: it never lies between two
    smoothed[:, 1:-1, 1:-1] = total.add_(6).div_(13, rounding_mode="floor")
    return smoothed


def blur(images: torch.Tensor, step: Blurs) -> None:
    """Applies Gaussian blur to images (B, S, S, 3) uint8, in place: three box filters along x, then three along y."""
    blurred = images.index_select(0, step.images).long()
    places = torch.arange(images.shape[1], device=images.device)
    # beyond the edge is the pixel of the edge
    taps = (places[:, None] + torch.arange(-2, 3, device=images.device)).clamp_(0, images.shape[1] - 1)
    weights = step.weights[:, None, None, :, None]
    for _ in range(2):
        for _ in range(3):
            # 8 bits after each filter
            summed = (blurred[:, :, taps] * weights).sum(3)
            blurred = summed.add_(1 << 23).bitwise_right_shift_(24)
        blurred = blurred.transpose(1, 2)
    images.index_copy_(0, step.images, blurred.byte())
