"""Reduces two-dimensional spectra to curves over the frequency."""

from __future__ import annotations

import torch


def radial_spectrum(power: torch.Tensor) -> tuple[list[float], list[float]]:
    """Mean power at each frequency of a two-dimensional DCT spectrum.

    Args:
        power: (h, w), from `pictures.spectrum`.

    Returns:
        Frequencies in cycles across the map, from 0 in steps of one half up to the highest of the longer side, and the mean
        power at each. A cycle across the map is one across the image, so curves of maps of different sizes can be compared.
    """
    h, w = power.shape
    rows, columns = torch.arange(h) / 2, torch.arange(w) / 2
    ring = (torch.hypot(rows[:, None], columns) * 2).round().long()
    # higher frequencies occur only in the corner of the spectrum, for diagonal waves
    count = max(h, w)
    sums = torch.zeros(int(ring.max()) + 1, dtype=power.dtype).index_add_(0, ring.flatten(), power.flatten())
    sizes = torch.bincount(ring.flatten(), minlength=len(sums))
    kept = [k for k in range(count) if sizes[k]]
    return [k / 2 for k in kept], (sums / sizes.clamp(min=1))[kept].tolist()
