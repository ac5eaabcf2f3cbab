"""Entry point of the dual-view loss: checks its arguments and picks the implementation."""

from __future__ import annotations

import torch

from scalekd_ds.kernels.dual_view import reference


def dual_view_loss(
    s_spatial: torch.Tensor,
    s_frequency: torch.Tensor,
    t: torch.Tensor,
    filter: torch.Tensor | None = None,
    weights: tuple[float, float] = (1.0, 1.0),
) -> torch.Tensor:
    """Both views of feature mimicking (ScaleKD section 3.2).

    Args:
        s_spatial: (B, P, C) projected student tokens of the spatial view.
        s_frequency: (B, P, C) projected student tokens of the frequency view.
        t: (B, P, C) teacher tokens, the target of both.
        filter: (P, R) orthonormal basis of what the frequency view drops; None drops the mean over tokens alone.
        weights: Factor of each view.

    Returns:
        (2,) weighted spatial and frequency loss, float32 or wider.

    Raises:
        ValueError: Shapes or devices that do not fit, naming the argument.
    """
    if t.dim() != 3:
        raise ValueError(f"t has shape {tuple(t.shape)}: it must be (batch, tokens, channels).")
    for name, s in (("s_spatial", s_spatial), ("s_frequency", s_frequency)):
        if s.shape != t.shape:
            raise ValueError(f"{name} has shape {tuple(s.shape)}: it must equal t's, {tuple(t.shape)}.")
        if s.device != t.device:
            raise ValueError(f"{name} is on {s.device}: it must be on t's device, {t.device}.")
    if filter is not None:
        if filter.dim() != 2 or filter.shape[0] != t.shape[1]:
            raise ValueError(f"filter has shape {tuple(filter.shape)}: it must be ({t.shape[1]}, rank).")
        if filter.shape[1] >= t.shape[1]:
            raise ValueError(f"filter has rank {filter.shape[1]}: it cuts everything; it must be below {t.shape[1]}.")
    return reference.dual_view_loss(s_spatial, s_frequency, t, filter, weights)
