"""Grey values as Pillow has them."""

from __future__ import annotations

import torch


def luma(pixels: torch.Tensor) -> torch.Tensor:
    """(..., 3) integers of 32 bits or more, 0 to 255, as (...) grey values: ITU-R 601-2 in units of 2^-16, rounded."""
    red, green, blue = pixels.unbind(-1)
    return (red * 19595).add_(green, alpha=38470).add_(blue, alpha=7471).add_(0x8000).bitwise_right_shift_(16)
