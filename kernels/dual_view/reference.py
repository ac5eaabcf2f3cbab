"""Dual-view feature mimicking in plain PyTorch: the specification.

Shape letters: B batch, P tokens of the teacher's grid, C channels, R rank of a filter.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

# F.normalize's clamp, which the published loss uses; it defines the loss for zero tokens
EPS = 1e-12


def view_loss(s_BPC: torch.Tensor, t_BPC: torch.Tensor) -> torch.Tensor:
    """(1/B) sum over tokens of ||s/|s| - t/|t|||^2, a scalar (ScaleKD, equation 5 per view)."""
    diff_BPC = F.normalize(s_BPC, dim=-1, eps=EPS) - F.normalize(t_BPC, dim=-1, eps=EPS)
    return diff_BPC.square().sum() / s_BPC.shape[0]


def high_pass(x_BPC: torch.Tensor, low_PR: torch.Tensor | None) -> torch.Tensor:
    """Removes the span of `low_PR` over the tokens of each channel; None removes the mean, which is the DC term.

    Zeroing DCT(0,0) and inverting equals subtracting each channel's mean over the grid, so the paper's loss needs no
    DCT. Any other band is one projection: `low_PR` holds the orthonormal DCT basis of what is dropped.
    """
    if low_PR is None:
        return x_BPC - x_BPC.mean(dim=1, keepdim=True)
    return x_BPC - low_PR @ (low_PR.T @ x_BPC)


def dual_view_loss(
    s_spatial_BPC: torch.Tensor,
    s_frequency_BPC: torch.Tensor,
    t_BPC: torch.Tensor,
    low_PR: torch.Tensor | None,
    weights: tuple[float, float],
) -> torch.Tensor:
    """(2,) weighted losses, spatial and frequency; sums in float32 or wider."""
    wide = torch.promote_types(torch.promote_types(s_spatial_BPC.dtype, t_BPC.dtype), torch.float32)
    # autocast would run the projection's matmul in bf16 and spoil the cancellation in `high_pass`
    with torch.autocast(s_spatial_BPC.device.type, enabled=False):
        s_spatial_BPC, s_frequency_BPC, t_BPC = (x.to(wide) for x in (s_spatial_BPC, s_frequency_BPC, t_BPC))
        low_PR = None if low_PR is None else low_PR.to(wide)
        spatial = view_loss(s_spatial_BPC, t_BPC)
        frequency = view_loss(high_pass(s_frequency_BPC, low_PR), high_pass(t_BPC, low_PR))
        return torch.stack([weights[0] * spatial, weights[1] * frequency])
