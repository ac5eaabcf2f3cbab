"""The projector's 3x3 convolution, and the patches that all views of one map can share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """The type in which a convolution or a matrix product computes with `x`, of any shape, alone of its operands."""
    device_type = x.device.type
    # autocast leaves float64 as it is
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device_type):
        return x.dtype
    return torch.get_autocast_dtype(device_type)


def patches_of(x: torch.Tensor) -> torch.Tensor | None:
    """Zero-padded 3x3 patches (B, h, w, 9C) of a map (B, C, h, w), in the order of a convolution's weight.

    None on accelerators and in float32, where the convolution itself is faster than patches and a matrix product. In 16
    bits on a CPU, the backward of the convolution took 2.7 times as long as that of the product at 7x7x2048.
    """
    dtype = autocast_dtype(x)
    if x.device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return None
    h, w = x.shape[-2:]
    padded = F.pad(x.to(dtype).permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    shifted = [padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]
    return torch.stack(shifted, -1).flatten(3)


class PatchConv(nn.Conv2d):
    """A 3x3 convolution that keeps the grid and the number of channels, and can start from patches.

    Args:
        channels: C of the maps (B, C, h, w) that it takes and gives.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor, patches: torch.Tensor | None = None) -> torch.Tensor:
        """(B, C, h, w) -> (B, C, h, w), in channels-last where `patches`, `patches_of(x)`, are given."""
        if patches is None:
            # the CPU's convolution is 10% slower in channels-last on maps as small as these, unlike the student's own
            return super().forward(x.contiguous() if x.device.type == "cpu" else x)
        return F.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)
