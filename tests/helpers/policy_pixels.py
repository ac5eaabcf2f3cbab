"""Images through a policy's operations, for the whole batch and by Pillow one by one."""

from __future__ import annotations

import platform

import numpy as np
import torch
from image_fixtures import picture
from PIL import Image

from scalekd_ds.data.on_device import apply_plan, plan_batch
from scalekd_ds.data.policy import Op, apply_ops

BILINEAR, BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC
FILL = (124, 116, 103)
# Pillow for other processors may be compiled to fused multiplications, which round otherwise: one operation may be a level
# off there
MOST = 0 if platform.machine() == "x86_64" else 1


def batch_of(count: int, side: int, seed: int = 0) -> np.ndarray:
    """(count, side, side, 3) uint8: smooth, noise, steps between few colours, one colour, and a channel of one level."""
    rng = np.random.default_rng(seed)
    images = np.stack([np.asarray(picture(rng, side, side)) for _ in range(count)])
    images[1::5] = rng.integers(0, 256, images[1::5].shape)
    images[2::5] = images[2::5] // 100 * 77
    images[3::5] = images[3::5, :1, :1]
    images[4::5, ..., 1] = 200
    return images


def largest_differences(drawn: list[list[Op]], side: int) -> np.ndarray:
    """(images,) the largest difference of each between the batch's way and Pillow's, in levels."""
    images = batch_of(len(drawn), side)
    expected = [apply_ops(image, ops, FILL) for image, ops in zip(images, drawn, strict=True)]
    found = torch.from_numpy(images.copy())
    plan = plan_batch(drawn, side)
    apply_plan(found, plan, plan.buffer, torch.tensor(FILL, dtype=torch.uint8))
    return np.abs(found.numpy().astype(int) - np.stack(expected)).reshape(len(drawn), -1).max(1)
