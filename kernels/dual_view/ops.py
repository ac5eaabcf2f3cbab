"""The dual-view loss as PyTorch operators: fake kernels and autograd.

`scalekd_ds::dual_view` runs the Triton kernels on CUDA tensors and under the interpreter, and the same arithmetic in
PyTorch on other tensors, so that `opcheck` and `torch.compile` can be tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from scalekd_ds.kernels.dual_view.launch import backward as _triton_backward
from scalekd_ds.kernels.dual_view.launch import forward as _triton_forward
from scalekd_ds.kernels.dual_view.launch import tile_for
from scalekd_ds.kernels.dual_view.reference import EPS, NOISE, high_pass
from scalekd_ds.kernels.interpreted import INTERPRETED


def _coefficients(
    ss_BP: torch.Tensor, tt_BP: torch.Tensor, st_BP: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss of each token and alpha and beta of its gradient, from |s|^2, |t|^2 and <s,t>; see triton_kernels."""
    s_rnorm, t_rnorm = 1 / ss_BP.sqrt().clamp_min(EPS), 1 / tt_BP.sqrt().clamp_min(EPS)
    cos = st_BP * s_rnorm * t_rnorm
    alpha = torch.where(ss_BP.sqrt() < EPS, 2 * s_rnorm, 2 * cos * s_rnorm) * s_rnorm
    loss = ss_BP * s_rnorm * s_rnorm + tt_BP * t_rnorm * t_rnorm - 2 * cos
    return loss, alpha, -2 * s_rnorm * t_rnorm


def _is_noise(filtered_BP: torch.Tensor, whole_BP: torch.Tensor) -> torch.Tensor:
    """Where the squared norm of a filtered token is that of rounding noise."""
    return filtered_BP <= NOISE**2 * whole_BP.amax(1, keepdim=True)


def _torch_forward(
    s_spatial: Sequence[torch.Tensor],
    s_frequency: Sequence[torch.Tensor],
    t: torch.Tensor,
    basis: torch.Tensor | None,
    weights: Sequence[float],
) -> tuple[torch.Tensor, torch.Tensor]:
    B = t.shape[0]
    t = t.float()
    v = high_pass(t, basis)
    tt, vv = t.square().sum(-1), v.square().sum(-1)
    v_noise = _is_noise(vv, tt)
    vv = vv.masked_fill(v_noise, 0)
    losses, coefs = [], []
    for index, (s, f) in enumerate(zip(s_spatial, s_frequency, strict=True)):
        s, f = s.float(), f.float()
        u = high_pass(f, basis)
        loss_s, alpha_s, beta_s = _coefficients(s.square().sum(-1), tt, (s * t).sum(-1))
        uu = u.square().sum(-1)
        u_noise = _is_noise(uu, f.square().sum(-1))
        uv = (u * v).sum(-1).masked_fill(u_noise | v_noise, 0)
        loss_f, alpha_f, beta_f = _coefficients(uu.masked_fill(u_noise, 0), vv, uv)
        alpha_f, beta_f = alpha_f.masked_fill(u_noise, 0), beta_f.masked_fill(u_noise | v_noise, 0)
        w_s, w_f = weights[2 * index] / B, weights[2 * index + 1] / B
        losses.append(torch.stack([loss_s.sum() * w_s, loss_f.sum() * w_f]))
        coefs.append(torch.stack([alpha_s * w_s, beta_s * w_s, alpha_f * w_f, beta_f * w_f], 1))
    return torch.stack(losses), torch.stack(coefs)


def _saturating_cast(gradient: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    limit = torch.finfo(dtype).max
    return gradient.clamp(-limit, limit).to(dtype)


def _torch_backward(
    upstream: torch.Tensor,
    s_spatial: Sequence[torch.Tensor],
    s_frequency: Sequence[torch.Tensor],
    t: torch.Tensor,
    basis: torch.Tensor | None,
    coef: torch.Tensor,
) -> list[torch.Tensor]:
    t = t.float()
    v = high_pass(t, basis)
    spatial, frequency = [], []
    for g, s, f, c in zip(upstream.float(), s_spatial, s_frequency, coef.unsqueeze(-1), strict=True):
        spatial.append(_saturating_cast(g[0] * (c[:, 0] * s.float() + c[:, 1] * t), s.dtype))
        u = high_pass(f.float(), basis)
        frequency.append(_saturating_cast(high_pass(g[1] * (c[:, 2] * u + c[:, 3] * v), basis), f.dtype))
    return spatial + frequency


def _runs_triton(t: torch.Tensor) -> bool:
    """Whether the operators run the Triton kernels, and not the same arithmetic in PyTorch."""
    return t.is_cuda or INTERPRETED.value


@torch.library.custom_op("scalekd_ds::dual_view", mutates_args=())
def dual_view(
    s_spatial: Sequence[torch.Tensor],
    s_frequency: Sequence[torch.Tensor],
    t: torch.Tensor,
    basis: torch.Tensor | None,
    weights: Sequence[float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The dual-view loss of L = 1 or 2 stages.

    Args:
        s_spatial: L tensors (B, P, C), student tokens of the spatial view.
        s_frequency: L tensors (B, P, C), student tokens of the frequency view.
        t: (B, P, C) teacher tokens, which get no gradient.
        basis: (P, R) orthonormal basis of what the frequency view drops; None drops the mean.
        weights: 2 L factors, spatial and frequency of each stage in turn.

    Returns:
        The weighted losses (L, 2), and the coefficients (L, B, 4, P) of their gradients: alpha and beta of the spatial
        view, then of the frequency view; both in float32.
    """
    if _runs_triton(t):
        return _triton_forward(s_spatial, s_frequency, t, basis, weights)
    # as in the reference: autocast would run the filter's products in 16 bits
    with torch.autocast(t.device.type, enabled=False):
        return _torch_forward(s_spatial, s_frequency, t, basis, weights)


@dual_view.register_fake
def _(
    s_spatial: Sequence[torch.Tensor],
    s_frequency: Sequence[torch.Tensor],
    t: torch.Tensor,
    basis: torch.Tensor | None,
    weights: Sequence[float],
) -> tuple[torch.Tensor, torch.Tensor]:
    L, (B, P, _) = len(s_spatial), t.shape
    return t.new_empty(L, 2, dtype=torch.float32), t.new_empty(L, B, 4, P, dtype=torch.float32)


@torch.library.custom_op("scalekd_ds::dual_view_backward", mutates_args=())
def dual_view_backward(
    upstream: torch.Tensor,
    s_spatial: Sequence[torch.Tensor],
    s_frequency: Sequence[torch.Tensor],
    t: torch.Tensor,
    basis: torch.Tensor | None,
    coef: torch.Tensor,
) -> list[torch.Tensor]:
    """Gradients of `dual_view`.

    Args:
        upstream: (L, 2) gradient of its losses.
        s_spatial: L tensors (B, P, C), as they were given.
        s_frequency: L tensors (B, P, C), as they were given.
        t: (B, P, C), as it was given.
        basis: (P, R) or None, as it was given.
        coef: (L, B, 4, P) coefficients that it returned.

    Returns:
        2 L contiguous tensors, first of the spatial and then of the frequency view, each in the dtype of its input.
    """
    if _runs_triton(t):
        return _triton_backward(upstream, s_spatial, s_frequency, t, basis, coef)
    with torch.autocast(t.device.type, enabled=False):
        return _torch_backward(upstream, s_spatial, s_frequency, t, basis, coef)


@dual_view_backward.register_fake
def _(
    upstream: torch.Tensor,
    s_spatial: Sequence[torch.Tensor],
    s_frequency: Sequence[torch.Tensor],
    t: torch.Tensor,
    basis: torch.Tensor | None,
    coef: torch.Tensor,
) -> list[torch.Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (*s_spatial, *s_frequency)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    s_spatial, s_frequency, t, basis, _ = inputs
    ctx.stages, ctx.has_basis = len(s_spatial), basis is not None
    ctx.save_for_backward(*s_spatial, *s_frequency, t, output[1], *([basis] if ctx.has_basis else []))


def _backward(
    ctx: Any, upstream: torch.Tensor, _: torch.Tensor
) -> tuple[list[torch.Tensor], list[torch.Tensor], None, None, None]:
    saved, L = ctx.saved_tensors, ctx.stages
    basis = saved[2 * L + 2] if ctx.has_basis else None
    out = dual_view_backward(upstream, saved[:L], saved[L : 2 * L], saved[2 * L], basis, saved[2 * L + 1])
    return out[:L], out[L:], None, None, None


dual_view.register_autograd(_backward, setup_context=_setup_context)


def dual_view_stages(
    s_spatial: Sequence[torch.Tensor],
    s_frequency: Sequence[torch.Tensor],
    t: torch.Tensor,
    basis: torch.Tensor | None,
    weights: Sequence[Sequence[float]],
) -> torch.Tensor:
    """Weighted losses of any number of stages, in as many launches as their tile needs.

    Args:
        s_spatial: L tensors (B, P, C), student tokens of the spatial view.
        s_frequency: L tensors (B, P, C), student tokens of the frequency view.
        t: (B, P, C) teacher tokens.
        basis: As in `dual_view`.
        weights: (spatial, frequency) factors of each stage.

    Returns:
        (L, 2) in float32.
    """
    per_launch = tile_for([*s_spatial, *s_frequency, t], basis).stages
    losses = []
    for start in range(0, len(s_spatial), per_launch):
        part = slice(start, start + per_launch)
        factors = [float(w) for pair in weights[part] for w in pair]
        losses.append(dual_view(list(s_spatial[part]), list(s_frequency[part]), t, basis, factors)[0])
    return torch.cat(losses)
