"""The spatial frequencies of a feature map, by the DCT on which the frequency view is built."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from scalekd_ds.inspection.pictures.canvas import heat_colours
from scalekd_ds.losses import dct_matrix


@torch.no_grad()
def spectrum(maps_BCHW: torch.Tensor) -> torch.Tensor:
    """Share of the power of maps (B, C, h, w) at each DCT frequency, over all images and channels: (h, w) float64 of sum 1.

    Row i, column j is the wave that crosses the map i / 2 times from top to bottom and j / 2 times from left to right;
    [0, 0] is the mean. A map of zeros gives zeros.
    """
    maps = maps_BCHW.detach().to("cpu", torch.float64)
    rows, columns = dct_matrix(maps.shape[-2]), dct_matrix(maps.shape[-1])
    power = (rows @ maps @ columns.T).square().sum((0, 1))
    total = power.sum()
    return power / total if total > 0 else power


def spectrum_pictures(spectra: Sequence[torch.Tensor], decades: float = 5.0) -> list[torch.Tensor]:
    """Spectra (h, w) as colours (3, h, w) on one logarithmic scale, with low frequencies at the top left.

    Args:
        spectra: From `spectrum`.
        decades: The scale starts this many powers of ten below the largest value of all spectra.
    """
    logs = [spectrum.clamp(min=1e-30).log10() for spectrum in spectra]
    highest = max(log.max() for log in logs)
    return [heat_colours(1.0 + (log - highest) / decades) for log in logs]
