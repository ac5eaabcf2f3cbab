"""The dual-view loss in plain PyTorch: its specification, which also runs on CPUs.

Shape letters: B batch, P tokens of the teacher's grid, C channels, R rank of a filter, L stages that share one target.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

# smallest norm that F.normalize divides by in the published loss; it defines the loss of tokens of zeros
EPS = 1e-12
# a filtered token whose norm is at most this share of its sample's largest token is rounding noise
NOISE = 1e-6


class _WidenFloat16(torch.autograd.Function):
    """float16 to float32 with a gradient that saturates, because that of a token of zeros is about 1e12."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.float()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        limit = torch.finfo(torch.float16).max
        return gradient.clamp(-limit, limit).half()


def _wide(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (_WidenFloat16.apply(x) if x.dtype == torch.float16 else x).to(dtype)


def high_pass(x_BPC: torch.Tensor, low_PR: torch.Tensor | None) -> torch.Tensor:
    """Removes the span of the orthonormal columns of `low_PR` from each channel; None removes each channel's mean.

    The paper sets DCT(0,0) to zero and inverts the DCT, which equals subtracting each channel's mean over the grid. To
    drop other frequencies, `low_PR` holds their columns of the orthonormal DCT.

    Args:
        x_BPC: (B, P, C) tokens.
        low_PR: (P, R) orthonormal columns, or None.

    Returns:
        (B, P, C).
    """
    if low_PR is None:
        return x_BPC - x_BPC.mean(dim=1, keepdim=True)
    low_PR = low_PR.to(x_BPC.dtype)
    return x_BPC - low_PR @ (low_PR.T @ x_BPC)


def filtered_unit(x_BPC: torch.Tensor, low_PR: torch.Tensor | None) -> torch.Tensor:
    """The tokens (B, P, C) after the filter, each divided by its norm; zero, without gradient, where it is noise.

    The filter leaves of a map that is constant over tokens, such as a student's 1x1 map, rounding noise of 1e-7 of its
    size. Dividing by its norm would turn that into a loss and a gradient of no meaning.
    """
    filtered = high_pass(x_BPC, low_PR)
    with torch.no_grad():
        norm = torch.linalg.vector_norm(filtered, dim=-1, keepdim=True)
        largest = torch.linalg.vector_norm(x_BPC, dim=-1, keepdim=True).amax(1, keepdim=True)
        noise = norm <= NOISE * largest
    return F.normalize(filtered.masked_fill(noise, 0.0), dim=-1, eps=EPS)


def dual_view_loss(
    s_spatial: Sequence[torch.Tensor],
    s_frequency: Sequence[torch.Tensor],
    t_BPC: torch.Tensor,
    low_PR: torch.Tensor | None,
    weights: Sequence[tuple[float, float]],
) -> torch.Tensor:
    """Weighted losses (L, 2) of each stage and view (ScaleKD, equation 5): (1/B) sum over tokens of |s/|s| - t/|t||^2.

    Args:
        s_spatial: (B, P, C) student tokens of the spatial view, for each of L stages.
        s_frequency: (B, P, C) student tokens of the frequency view, for each of L stages.
        t_BPC: Teacher tokens.
        low_PR: Filter of the frequency view, as in `high_pass`.
        weights: (spatial, frequency) factors of each stage.
    """
    wide = torch.promote_types(t_BPC.dtype, torch.float32)
    for s in (*s_spatial, *s_frequency):
        wide = torch.promote_types(wide, s.dtype)
    # autocast would run the products of `high_pass` in 16 bits, where they cancel
    with torch.autocast(t_BPC.device.type, enabled=False):
        t_BPC = t_BPC.to(wide)
        t_unit, v_unit = F.normalize(t_BPC, dim=-1, eps=EPS), filtered_unit(t_BPC, low_PR)
        losses = []
        for s_BPC, f_BPC, (spatial, frequency) in zip(s_spatial, s_frequency, weights, strict=True):
            s_unit = F.normalize(_wide(s_BPC, wide), dim=-1, eps=EPS)
            u_unit = filtered_unit(_wide(f_BPC, wide), low_PR)
            losses.append(spatial * (s_unit - t_unit).square().sum())
            losses.append(frequency * (u_unit - v_unit).square().sum())
        return torch.stack(losses).unflatten(0, (-1, 2)) / t_BPC.shape[0]
