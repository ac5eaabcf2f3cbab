"""Leads from images in one normalisation to those in another."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# the mean and the standard deviation of each channel, for pixels in [0, 1]
Normalisation = tuple[Sequence[float], Sequence[float]]


def change_of_normalisation(before: Normalisation, after: Normalisation) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift, (3, 1, 1) float32 each: images (B, 3, H, W) in `before` become `images * scale + shift` in `after`."""
    mean, std, new_mean, new_std = (
        torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (*before, *after)
    )
    return (std / new_std).float(), ((mean - new_mean) / new_std).float()
