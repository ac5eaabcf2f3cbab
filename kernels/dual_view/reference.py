"""Dual-view feature mimicking in plain PyTorch: the specification, and what runs on CPU.

Shape letters: B batch, P tokens of the teacher's grid, C channels, R rank of a filter, L stages that share one target.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

# F.normalize's clamp, which the published loss uses; it defines the loss for zero tokens
EPS = 1e-12
# a filtered token below this share of its sample's largest token is rounding noise: the map is constant there
NOISE = 1e-6


class _Widen(torch.autograd.Function):
    """float16 to float32, with a gradient that saturates: a token of zeros has one of 1e12 by definition."""

    @staticmethod
    def forward(ctx, x):
        return x.float()

    @staticmethod
    def backward(ctx, gradient):
        limit = torch.finfo(torch.float16).max
        return gradient.clamp(-limit, limit).half()


def _wide(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (_Widen.apply(x) if x.dtype == torch.float16 else x).to(dtype)


def high_pass(x_BPC: torch.Tensor, low_PR: torch.Tensor | None) -> torch.Tensor:
    """Removes the span of `low_PR` over the tokens of each channel; None removes the mean, which is the DC term.

    Zeroing DCT(0,0) and inverting equals subtracting each channel's mean over the grid, so the paper's loss needs no
    DCT. Any other band is one projection: `low_PR` holds the orthonormal DCT basis of what is dropped.
    """
    if low_PR is None:
        return x_BPC - x_BPC.mean(dim=1, keepdim=True)
    low_PR = low_PR.to(x_BPC.dtype)
    return x_BPC - low_PR @ (low_PR.T @ x_BPC)


def filtered_unit(x_BPC: torch.Tensor, low_PR: torch.Tensor | None) -> torch.Tensor:
    """Unit tokens of the filtered map; zero, without gradient, where nothing but rounding noise is left.

    A map that is constant over tokens filters to noise of 1e-7 of its size, which normalising would blow up to a loss
    and a gradient of no meaning: a student's 1x1 map, or a dead channel block.
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
    """(L, 2) weighted losses of each stage, (1/B) sum over tokens of ||s/|s| - t/|t|||^2 (ScaleKD, equation 5 per view).

    The target's part is computed once for all stages. Sums in float32 or wider.
    """
    wide = torch.promote_types(t_BPC.dtype, torch.float32)
    for s in (*s_spatial, *s_frequency):
        wide = torch.promote_types(wide, s.dtype)
    # autocast would run the projection's matmul in bf16 and spoil the cancellation in `high_pass`
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
