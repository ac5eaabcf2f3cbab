"""The projector's 3x3 convolution, and the patches that all views of one map can share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from scalekd_ds.projector.winograd import tiles_of, winograd_conv


def autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """The type in which a convolution or a matrix product computes with `x`, of any shape, alone of its operands."""
    device_type = x.device.type
    # autocast leaves float64 as it is
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device_type):
        return x.dtype
    return torch.get_autocast_dtype(device_type)


# where it was measured: how a CPU without wider vectors computes in float32
_IS_AVX2 = torch.backends.cpu.get_cpu_capability() == "AVX2"
# tiles in a batch from which Winograd's transforms of the weights are made up for by its products
_MANY_TILES = 256


def patches_of(x: torch.Tensor) -> torch.Tensor:
    """Zero-padded 3x3 patches (B, h, w, 9C) of a map (B, C, h, w), in the order of a convolution's weight."""
    x = x.to(autocast_dtype(x))
    h, w = x.shape[-2:]
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    shifted = [padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]
    return torch.stack(shifted, -1).flatten(3)


class PatchConv(nn.Conv2d):
    """A 3x3 convolution that keeps the grid and the number of channels, and can start from patches.

    Args:
        channels: C of the maps (B, C, h, w) that it takes and gives.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)
        # not where a plan is made on the meta device, which is the same on every machine
        self._measured = _IS_AVX2 and self.weight.device.type == "cpu"

    def patches(self, x: torch.Tensor) -> torch.Tensor | None:
        """`patches_of(x)`, which all views of a map can share, where a product with them is faster than the convolution.

        None elsewhere, and on accelerators. On CPUs, forward and backward at 7x7x2048 and batch 8: in 16 bits the backward of
        the convolution took 2.7 times as long as that of the product; in float32 on one with AVX2 both together 1.5 times.
        """
        if x.device.type != "cpu":
            return None
        if autocast_dtype(x) in (torch.bfloat16, torch.float16):
            return patches_of(x)
        # the weights of wide layers on small maps are laid out anew by oneDNN for each pass, which takes the time
        is_small = x.shape[-2] * x.shape[-1] <= 64 and x.shape[1] >= 1024
        return patches_of(x) if self._is_measured(x) and is_small and tiles_of(x) < _MANY_TILES else None

    def _is_measured(self, x: torch.Tensor) -> bool:
        return self._measured and x.device.type == "cpu" and autocast_dtype(x) == torch.float32

    def forward(self, x: torch.Tensor, patches: torch.Tensor | None = None) -> torch.Tensor:
        """(B, C, h, w) -> (B, C, h, w), in channels-last where `patches`, of the method of that name, are given."""
        if patches is not None:
            return F.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)
        # 1.1 to 1.4 times as fast as the convolution there, forward and backward, at 7x7 to 28x28 and 256 to 2048 channels
        if self._is_measured(x) and self.bias is not None and tiles_of(x) >= _MANY_TILES:
            return winograd_conv(x, self.weight, self.bias)
        # the CPU's convolution is 10% slower in channels-last on maps as small as these, unlike the student's own
        return super().forward(x.contiguous() if x.device.type == "cpu" else x)
