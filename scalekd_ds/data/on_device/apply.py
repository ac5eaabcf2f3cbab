"""Applies the steps of a plan to a batch, in place."""

from __future__ import annotations

import torch

from scalekd_ds.data.on_device.filters import blend, blur
from scalekd_ds.data.on_device.plan import Blends, Blurs, Plan, Points, Shifts, unpack
from scalekd_ds.data.on_device.points import map_levels
from scalekd_ds.data.on_device.warps import shift, turn


def apply_plan(images: torch.Tensor, plan: Plan, buffer: torch.Tensor, fill: torch.Tensor) -> None:
    """Applies a plan in place. The number of kernels depends on the kinds of operations and not on the batch.

    Args:
        images: (B, S, S, 3) uint8, contiguous.
        plan: The steps.
        buffer: The plan's buffer on the device of the images.
        fill: (3,) uint8 there, the colour of the pixels that geometric operations uncover.
    """
    for step in unpack(plan, buffer):
        if isinstance(step, Points):
            map_levels(images, step)
        elif isinstance(step, Blends):
            blend(images, step)
        elif isinstance(step, Blurs):
            blur(images, step)
        elif isinstance(step, Shifts):
            shift(images, step, fill)
        else:
            turn(images, step, fill)
