"""The dual-view loss as PyTorch operators: launchers, fake kernels and autograd.

`scalekd_ds::dual_view` runs on what it is given: Triton on CUDA tensors and under the interpreter, the same arithmetic in
PyTorch on other CPU tensors, so that `opcheck` and `torch.compile` can be tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton

from scalekd_ds.kernels.dual_view import triton_kernels as kernels
from scalekd_ds.kernels.dual_view.reference import EPS, NOISE, high_pass
from scalekd_ds.kernels.interpreted import INTERPRETED

MAX_TOKENS, MAX_RANK = 1024, 64
# P up to which a filter is a dot: beyond, its operands spill
MAX_DOT = 128


class Tile(NamedTuple):
    """Padded P, channels of a program, warps, and the stages that a launch takes at once."""

    tokens: int
    channels: int
    warps: int
    stages: int = 2


# (filter's kind, padded P) -> channels, warps, stages; no spills on sm_90 and fewest elsewhere, tests/kernels asserts it
_TILES = {
    (kernels.MEAN, 64): (64, 8, 2),
    (kernels.MEAN, 128): (32, 8, 2),
    (kernels.MEAN, 256): (16, 8, 2),
    (kernels.MEAN, 512): (16, 16, 1),
    # rows of 16 bytes in 16 bits use half of each sector read; a wider tile spills
    (kernels.MEAN, 1024): (8, 16, 1),
    (kernels.LOW_RANK, 64): (32, 8, 2),
    (kernels.LOW_RANK, 128): (16, 8, 2),
    (kernels.DENSE, 64): (32, 8, 2),
    (kernels.DENSE, 128): (32, 8, 1),
    (kernels.SWEEP, 256): (16, 8, 2),
    (kernels.SWEEP, 512): (8, 16, 1),
    (kernels.SWEEP, 1024): (8, 16, 1),
}


class Filter(NamedTuple):
    """How a launch applies F: `kind` as in triton_kernels, `matrix` (P, R) or (P, P), its width, whether the mean goes."""

    kind: int
    matrix: torch.Tensor | None
    width: int
    drops_mean: bool


def padded(size: int) -> int:
    """The next power of two that a tile's dot accepts."""
    return max(16, triton.next_power_of_2(size))


def kind_of(tokens: int, rank: int | None) -> int | None:
    """How a filter of rank R over P tokens is applied (R None: the mean alone); None where no kernel takes it."""
    if tokens > MAX_TOKENS:
        return None
    if rank is None:
        return kernels.MEAN
    if padded(tokens) <= MAX_DOT:
        # the cheaper of two dots of rank R and one with a (P, P) matrix
        return kernels.LOW_RANK if 2 * rank <= tokens else kernels.DENSE
    return kernels.SWEEP if rank <= MAX_RANK else None


def tile_of(tokens: int, rank: int | None, itemsize: int) -> Tile:
    """The tile of a launch that `kind_of` has a kernel for; `itemsize` of the widest tensor, in bytes."""
    kind, size = kind_of(tokens, rank), max(64, padded(tokens))
    if (kind, size) == (kernels.MEAN, 256) and itemsize == 2:
        return Tile(size, 32, 16)
    return Tile(size, *_TILES[kind, size])


def _tile_for(tensors: Sequence[torch.Tensor], basis: torch.Tensor | None) -> Tile:
    rank = None if basis is None else basis.shape[1]
    return tile_of(tensors[0].shape[1], rank, max(x.element_size() for x in tensors))


# by identity: a run uses one or two bases, and reading one back waits for the device
_filters: dict[int, tuple[torch.Tensor, Filter]] = {}


def _drops_mean(basis: torch.Tensor) -> bool:
    """True where the constant map lies in the span of `basis` (P, R)."""
    inside = basis.double().sum(0).square().sum().item()
    return abs(inside - basis.shape[0]) < 1e-3 * basis.shape[0]


def filter_of(basis: torch.Tensor | None) -> Filter:
    """What a launch needs to apply the projection that drops `basis` (P, R)."""
    if basis is None:
        return Filter(kernels.MEAN, None, 1, True)
    if id(basis) not in _filters:
        tokens, rank = basis.shape
        matrix, kind, width = basis.float().contiguous(), kind_of(tokens, rank), rank
        if kind == kernels.DENSE:
            matrix, width = (torch.eye(tokens, device=basis.device) - matrix @ matrix.T).contiguous(), tokens
        if len(_filters) >= 16:
            _filters.clear()
        # the basis is kept with its answer, so that the id stays its own
        _filters[id(basis)] = (basis, Filter(kind, matrix, width, _drops_mean(basis)))
    return _filters[id(basis)][1]


def _launch(
    s_spatial: Sequence[torch.Tensor], s_frequency: Sequence[torch.Tensor], t: torch.Tensor, basis: torch.Tensor | None
) -> tuple[list, list, dict, dict]:
    """Pointers, strides, constants and options that forward and backward share; one stage stands in for a missing second."""
    both = [x for pair in zip(s_spatial, s_frequency, strict=True) for x in pair]
    both = both if len(both) == 4 else both * 2
    f = filter_of(basis)
    tile = _tile_for([*both, t], basis)
    constants = {
        "C": t.shape[2],
        "L": len(s_spatial),
        "BP": tile.tokens,
        "BC": tile.channels,
        "R": f.width,
        "BR": padded(f.width),
        "KIND": f.kind,
        "DROPS_MEAN": f.drops_mean,
        # the interpreter knows no tf32; on a GPU tf32x3 spills
        "PRECISION": "ieee" if INTERPRETED.value else "tf32",
    }
    options = {"num_warps": tile.warps, "num_stages": 1, "enable_fp_fusion": True}
    strides = [stride for x in (*both, t) for stride in x.stride()[:2]]
    return [*both, t, t if f.matrix is None else f.matrix], strides, constants, options


def _triton_forward(s_spatial, s_frequency, t, basis, weights):
    B, P, C = t.shape
    L = len(s_spatial)
    pointers, strides, constants, options = _launch(s_spatial, s_frequency, t, basis)
    splits = 4 if 4 * constants["BC"] <= C else 1
    sums = t.new_empty(B, splits, 2 + 5 * L, P, dtype=torch.float32)
    coef = t.new_empty(L, B, 4, P, dtype=torch.float32)
    loss = t.new_empty(B, L, 2, dtype=torch.float32)
    scaled = torch.tensor([w / B for w in weights], device=t.device, dtype=torch.float32)
    kernels.dual_view_sums_kernel[(B, splits)](*pointers, sums, *strides, P, K=splits, **constants, **options)
    kernels.dual_view_finish_kernel[(B,)](
        sums, coef, loss, scaled, P, K=splits, L=L, BP=constants["BP"], EPS=EPS, NOISE=NOISE**2,
        num_warps=1 if P <= 256 else 4, enable_fp_fusion=True,
    )  # fmt: skip
    return loss.sum(0), coef


def _triton_backward(upstream, s_spatial, s_frequency, t, basis, coef):
    B, P, C = t.shape
    pointers, strides, constants, options = _launch(s_spatial, s_frequency, t, basis)
    gradients = [
        torch.empty(t.shape, device=t.device, dtype=x.dtype)
        for pair in zip(s_spatial, s_frequency, strict=True)
        for x in pair
    ]
    out = gradients if len(gradients) == 4 else gradients * 2
    kernels.dual_view_backward_kernel[(B, triton.cdiv(C, constants["BC"]))](
        *pointers, coef, upstream.float().contiguous(), *out, *strides, P, **constants, **options
    )  # fmt: skip
    return gradients[0::2] + gradients[1::2]


def _coefficients(a_BP, b_BP, c_BP):
    """Loss, A and B of a view's tokens; see triton_kernels."""
    rs, rt = 1 / a_BP.sqrt().clamp_min(EPS), 1 / b_BP.sqrt().clamp_min(EPS)
    cos = c_BP * rs * rt
    slope = torch.where(a_BP.sqrt() < EPS, 2 * rs, 2 * cos * rs) * rs
    return a_BP * rs * rs + b_BP * rt * rt - 2 * cos, slope, -2 * rs * rt


def _silent(filtered_BP, whole_BP):
    return filtered_BP <= NOISE**2 * whole_BP.amax(1, keepdim=True)


def _torch_forward(s_spatial, s_frequency, t, basis, weights):
    B = t.shape[0]
    t = t.float()
    v = high_pass(t, basis)
    tt, vv = t.square().sum(-1), v.square().sum(-1)
    t_silent = _silent(vv, tt)
    vv = vv.masked_fill(t_silent, 0)
    losses, coefs = [], []
    for index, (s, f) in enumerate(zip(s_spatial, s_frequency, strict=True)):
        s, f = s.float(), f.float()
        u = high_pass(f, basis)
        loss_s, a_s, b_s = _coefficients(s.square().sum(-1), tt, (s * t).sum(-1))
        uu = u.square().sum(-1)
        silent = _silent(uu, f.square().sum(-1))
        uv = (u * v).sum(-1).masked_fill(silent | t_silent, 0)
        loss_f, a_f, b_f = _coefficients(uu.masked_fill(silent, 0), vv, uv)
        a_f, b_f = a_f.masked_fill(silent, 0), b_f.masked_fill(silent | t_silent, 0)
        w_s, w_f = weights[2 * index] / B, weights[2 * index + 1] / B
        losses.append(torch.stack([loss_s.sum() * w_s, loss_f.sum() * w_f]))
        coefs.append(torch.stack([a_s * w_s, b_s * w_s, a_f * w_f, b_f * w_f], 1))
    return torch.stack(losses), torch.stack(coefs)


def _stored_as(gradient: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    limit = torch.finfo(dtype).max
    return gradient.clamp(-limit, limit).to(dtype)


def _torch_backward(upstream, s_spatial, s_frequency, t, basis, coef):
    t = t.float()
    v = high_pass(t, basis)
    spatial, frequency = [], []
    for g, s, f, c in zip(upstream.float(), s_spatial, s_frequency, coef.unsqueeze(-1), strict=True):
        spatial.append(_stored_as(g[0] * (c[:, 0] * s.float() + c[:, 1] * t), s.dtype))
        u = high_pass(f.float(), basis)
        frequency.append(_stored_as(high_pass(g[1] * (c[:, 2] * u + c[:, 3] * v), basis), f.dtype))
    return spatial + frequency


def _on_triton(t: torch.Tensor) -> bool:
    return t.is_cuda or INTERPRETED.value


@torch.library.custom_op("scalekd_ds::dual_view", mutates_args=())
def dual_view(
    s_spatial: Sequence[torch.Tensor],
    s_frequency: Sequence[torch.Tensor],
    t: torch.Tensor,
    basis: torch.Tensor | None,
    weights: Sequence[float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted losses (L, 2) and the coefficients (L, B, 4, P) of their gradients, both float32; L is 1 or 2."""
    forward = _triton_forward if _on_triton(t) else _torch_forward
    return forward(s_spatial, s_frequency, t, basis, weights)


@dual_view.register_fake
def _(s_spatial, s_frequency, t, basis, weights):
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
    """Gradients of the L spatial, then of the L frequency tensors, contiguous, each in its tensor's dtype."""
    backward = _triton_backward if _on_triton(t) else _torch_backward
    return backward(upstream, s_spatial, s_frequency, t, basis, coef)


@dual_view_backward.register_fake
def _(upstream, s_spatial, s_frequency, t, basis, coef):
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (*s_spatial, *s_frequency)]


def _setup_context(ctx, inputs, output):
    s_spatial, s_frequency, t, basis, _ = inputs
    ctx.stages, ctx.has_basis = len(s_spatial), basis is not None
    ctx.save_for_backward(*s_spatial, *s_frequency, t, output[1], *([basis] if ctx.has_basis else []))


def _backward(ctx, upstream, _):
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
    """(L, 2) weighted losses of any number of stages, as many in a launch as its tile takes."""
    step = _tile_for([*s_spatial, *s_frequency, t], basis).stages
    losses = []
    for i in range(0, len(s_spatial), step):
        flat = [float(w) for pair in weights[i : i + step] for w in pair]
        losses.append(dual_view(list(s_spatial[i : i + step]), list(s_frequency[i : i + step]), t, basis, flat)[0])
    return torch.cat(losses)
