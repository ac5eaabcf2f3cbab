"""Two-dimensional spectra as curves over the frequency alone."""

from __future__ import annotations

import torch


def radial(power: torch.Tensor) -> tuple[list[float], list[float]]:
    """Mean power by frequency of a DCT spectrum (h, w), as `pictures.spectrum` gives it.

    Returns:
        Frequencies in cycles across the map, from 0 in steps of a half up to what the longer side can hold, and the mean
        of the powers there. Models with maps of other sizes share the scale: a cycle across the map is one across the image.
    """
    h, w = power.shape
    rows, columns = torch.arange(h) / 2, torch.arange(w) / 2
    ring = (torch.hypot(rows[:, None], columns) * 2).round().long()
    # the corners beyond hold few waves, all of them diagonal
    count = max(h, w)
    sums = torch.zeros(int(ring.max()) + 1, dtype=power.dtype).index_add_(0, ring.flatten(), power.flatten())
    sizes = torch.bincount(ring.flatten(), minlength=len(sums))
    kept = [k for k in range(count) if sizes[k]]
    return [k / 2 for k in kept], (sums / sizes.clamp(min=1))[kept].tolist()
