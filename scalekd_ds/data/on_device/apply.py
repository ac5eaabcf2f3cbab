"""Applies the steps of a plan to a batch, in place."""

from __future__ import annotations

import torch

from scalekd_ds.data.on_device.filters import blend, blur
from scalekd_ds.data.on_device.plan import Blends, Blurs, Plan, Points, unpack
from scalekd_ds.data.on_device.points import map_levels
from scalekd_ds.data.on_device.warps import warp
from scalekd_ds.kernels import policy as fused
from scalekd_ds.kernels.interpreted import INTERPRETED


def apply_plan(images: torch.Tensor, plan: Plan, buffer: torch.Tensor, fill: torch.Tensor) -> None:
    """Applies a plan in place. The number of kernels depends on the kinds of operations and not on the batch.

    On a GPU, and in Triton's interpreter, a step is one to four launches of Triton's kernels; elsewhere it is PyTorch, with
    the same numbers. Gaussian blur, which policies with `3a` in their name have alone, is PyTorch everywhere.

    Args:
        images: (B, S, S, 3) uint8, contiguous.
        plan: The steps.
        buffer: The plan's buffer on the device of the images.
        fill: (3,) uint8 there, the colour of the pixels that geometric operations uncover.
    """
    by_triton = images.device.type == "cuda" or INTERPRETED.value
    for step in unpack(plan, buffer):
        if isinstance(step, Blurs):
            blur(images, step)
        elif isinstance(step, Points):
            fused.map_levels(images, *step) if by_triton else map_levels(images, step)
        elif isinstance(step, Blends):
            fused.blend(images, *step) if by_triton else blend(images, step)
        elif by_triton:
            fused.warp(images, step.images, step.matrices, step.bicubic, fill)
        else:
            warp(images, step, fill)
