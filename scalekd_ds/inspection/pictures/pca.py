"""Shows feature maps as colours: their three strongest principal components as red, green and blue."""

from __future__ import annotations

import torch


def tokens_to_map(tokens_BPC: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Tokens (B, P, C), row by row on `grid`, as a map (B, C, h, w)."""
    return tokens_BPC.transpose(1, 2).unflatten(2, grid)


@torch.no_grad()
def pca_colours(maps_BCHW: torch.Tensor) -> torch.Tensor:
    """Colours (B, 3, h, w) in 0 to 1 of one model's maps (B, C, h, w).

    The components are fitted on all the maps together, so the same colour means the same features in each of them, but not
    in the maps of another model. Each component is scaled so that its 1st and 99th percentile are 0 and 1. Its sign is
    chosen so that its largest weight is positive, which makes the colours reproducible. A component without variance, such
    as the third of two channels, is 0.5.
    """
    maps = maps_BCHW.detach().to("cpu", torch.float64)
    rows_MC = maps.permute(0, 2, 3, 1).flatten(0, 2)
    centred = rows_MC - rows_MC.mean(0)
    count = min(3, *centred.shape)
    # takes some milliseconds for hundreds of cells and thousands of channels
    _, scales, components_KC = torch.linalg.svd(centred, full_matrices=False)
    components_KC, scales = components_KC[:count], scales[:count]
    largest = components_KC.gather(1, components_KC.abs().argmax(1, keepdim=True))
    scores_MK = centred @ (components_KC * largest.sign()).T
    low, high = scores_MK.quantile(0.01, 0), scores_MK.quantile(0.99, 0)
    # components below this threshold are rounding errors of float32
    has_variance = (scales > 1e-5 * scales[0].clamp(min=1e-30)) & (high > low)
    scaled = ((scores_MK - low) / (high - low).clamp(min=1e-30)).clamp(0.0, 1.0)
    colours_M3 = torch.full((len(rows_MC), 3), 0.5, dtype=torch.float64)
    colours_M3[:, :count] = torch.where(has_variance, scaled, 0.5)
    return colours_M3.reshape(maps.shape[0], *maps.shape[-2:], 3).permute(0, 3, 1, 2).float()
