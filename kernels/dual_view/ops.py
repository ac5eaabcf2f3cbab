"""The dual-view loss as PyTorch operators: launchers, fake kernels and autograd.

`scalekd_ds::dual_view` runs the Triton kernels on CUDA tensors and under the interpreter, and the same arithmetic in
PyTorch on other tensors, so that `opcheck` and `torch.compile` can be tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton

from scalekd_ds.kernels.dual_view import triton_kernels as kernels
from scalekd_ds.kernels.dual_view.reference import EPS, NOISE, high_pass
from scalekd_ds.kernels.interpreted import INTERPRETED

# largest P, and largest rank of a filter that is applied column by column, that the kernels take
MAX_TOKENS, MAX_RANK = 1024, 64
# largest padded P for which a filter is a matrix product: the operands of a larger one spill
MAX_DOT_TOKENS = 128


class Tile(NamedTuple):
    """The part of the work that one program of a launch does.

    Attributes:
        tokens: P, padded to a power of two: a program has all tokens of its channels.
        channels: Channels that a program holds at once.
        warps: Warps of a program.
        stages: Stages of the student that one launch takes.
    """

    tokens: int
    channels: int
    warps: int
    stages: int = 2


# (kind of filter, padded P) -> the other fields of `Tile`: none spills on sm_90, which tests/kernels checks
_TILES = {
    (kernels.MEAN, 64): (64, 8, 2),
    (kernels.MEAN, 128): (32, 8, 2),
    (kernels.MEAN, 256): (16, 8, 2),
    (kernels.MEAN, 512): (16, 16, 1),
    # 8 channels in 16 bits use half of each 32-byte sector that is read, but a wider tile spills
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
    """How a launch applies the filter of the frequency view.

    Attributes:
        kind: `MEAN`, `LOW_RANK`, `DENSE` or `SWEEP` of triton_kernels.
        matrix: The basis (P, R), or for `DENSE` the projection (P, P); None for `MEAN`.
        width: Columns of `matrix`; 1 without one.
        drops_mean: Whether the filter removes the mean over tokens.
    """

    kind: int
    matrix: torch.Tensor | None
    width: int
    drops_mean: bool


def padded(size: int) -> int:
    """The next power of two, at least 16, the smallest side of a matrix product in Triton."""
    return max(16, triton.next_power_of_2(size))


def kind_of(tokens: int, rank: int | None) -> int | None:
    """The kind of a filter of rank R (None: the mean alone) over P tokens; None where the kernels do not take it."""
    if tokens > MAX_TOKENS:
        return None
    if rank is None:
        return kernels.MEAN
    if padded(tokens) <= MAX_DOT_TOKENS:
        # the cheaper of two products with (P, R) and one with (P, P)
        return kernels.LOW_RANK if 2 * rank <= tokens else kernels.DENSE
    return kernels.SWEEP if rank <= MAX_RANK else None


def tile_of(tokens: int, rank: int | None, itemsize: int) -> Tile:
    """The tile of a launch, for arguments that `kind_of` has a kind for.

    Args:
        tokens: P.
        rank: Rank of the filter; None for the mean alone.
        itemsize: Bytes of one number of the widest tensor.
    """
    kind, size = kind_of(tokens, rank), max(64, padded(tokens))
    if (kind, size) == (kernels.MEAN, 256) and itemsize == 2:
        return Tile(size, 32, 16)
    return Tile(size, *_TILES[kind, size])


def _tile_for(tensors: Sequence[torch.Tensor], basis: torch.Tensor | None) -> Tile:
    rank = None if basis is None else basis.shape[1]
    return tile_of(tensors[0].shape[1], rank, max(x.element_size() for x in tensors))


# filters by the identity of their basis, because making one waits for the device; a run has one or two
_filter_cache: dict[int, tuple[torch.Tensor, Filter]] = {}


def _drops_mean(basis: torch.Tensor) -> bool:
    """Whether the constant map lies in the span of `basis` (P, R)."""
    # squared norm of the projection of a map of ones, which itself has P
    projected = basis.double().sum(0).square().sum().item()
    return abs(projected - basis.shape[0]) < 1e-3 * basis.shape[0]


def filter_of(basis: torch.Tensor | None) -> Filter:
    """How a launch removes the span of `basis` (P, R), or the mean where that is None."""
    if basis is None:
        return Filter(kernels.MEAN, None, 1, True)
    if id(basis) not in _filter_cache:
        tokens, rank = basis.shape
        matrix, kind, width = basis.float().contiguous(), kind_of(tokens, rank), rank
        if kind == kernels.DENSE:
            matrix, width = (torch.eye(tokens, device=basis.device) - matrix @ matrix.T).contiguous(), tokens
        if len(_filter_cache) >= 16:
            _filter_cache.clear()
        # the basis is kept with its filter, so that no other tensor can get its id
        _filter_cache[id(basis)] = (basis, Filter(kind, matrix, width, _drops_mean(basis)))
    return _filter_cache[id(basis)][1]


def _launch_arguments(
    s_spatial: Sequence[torch.Tensor], s_frequency: Sequence[torch.Tensor], t: torch.Tensor, basis: torch.Tensor | None
) -> tuple[list, list, dict, dict]:
    """Pointers, strides, constants and options that forward and backward share.

    The kernels have arguments for two stages: a single stage is passed twice, and L = 1 ignores the second.
    """
    students = [x for pair in zip(s_spatial, s_frequency, strict=True) for x in pair]
    students = students if len(students) == 4 else students * 2
    filter_ = filter_of(basis)
    tile = _tile_for([*students, t], basis)
    constants = {
        "C": t.shape[2],
        "L": len(s_spatial),
        "BP": tile.tokens,
        "BC": tile.channels,
        "R": filter_.width,
        "BR": padded(filter_.width),
        "KIND": filter_.kind,
        "DROPS_MEAN": filter_.drops_mean,
        # tf32 on a GPU, because the more exact tf32x3 spills; the interpreter has float32 only
        "PRECISION": "ieee" if INTERPRETED.value else "tf32",
    }
    options = {"num_warps": tile.warps, "num_stages": 1, "enable_fp_fusion": True}
    strides = [stride for x in (*students, t) for stride in x.stride()[:2]]
    return [*students, t, t if filter_.matrix is None else filter_.matrix], strides, constants, options


def _triton_forward(s_spatial, s_frequency, t, basis, weights):
    B, P, C = t.shape
    L = len(s_spatial)
    pointers, strides, constants, options = _launch_arguments(s_spatial, s_frequency, t, basis)
    splits = 4 if 4 * constants["BC"] <= C else 1
    sums = t.new_empty(B, splits, 2 + 5 * L, P, dtype=torch.float32)
    coef = t.new_empty(L, B, 4, P, dtype=torch.float32)
    loss = t.new_empty(B, L, 2, dtype=torch.float32)
    weights_over_batch = torch.tensor([w / B for w in weights], device=t.device, dtype=torch.float32)
    kernels.dual_view_sums_kernel[(B, splits)](*pointers, sums, *strides, P, K=splits, **constants, **options)
    kernels.dual_view_finish_kernel[(B,)](
        sums, coef, loss, weights_over_batch, P, K=splits, L=L, BP=constants["BP"], EPS=EPS, NOISE=NOISE**2,
        num_warps=1 if P <= 256 else 4, enable_fp_fusion=True,
    )  # fmt: skip
    return loss.sum(0), coef


def _triton_backward(upstream, s_spatial, s_frequency, t, basis, coef):
    B, P, C = t.shape
    pointers, strides, constants, options = _launch_arguments(s_spatial, s_frequency, t, basis)
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


def _coefficients(ss_BP, tt_BP, st_BP):
    """Loss of each token and alpha and beta of its gradient, from |s|^2, |t|^2 and <s,t>; see triton_kernels."""
    s_rnorm, t_rnorm = 1 / ss_BP.sqrt().clamp_min(EPS), 1 / tt_BP.sqrt().clamp_min(EPS)
    cos = st_BP * s_rnorm * t_rnorm
    alpha = torch.where(ss_BP.sqrt() < EPS, 2 * s_rnorm, 2 * cos * s_rnorm) * s_rnorm
    loss = ss_BP * s_rnorm * s_rnorm + tt_BP * t_rnorm * t_rnorm - 2 * cos
    return loss, alpha, -2 * s_rnorm * t_rnorm


def _is_noise(filtered_BP, whole_BP):
    """Where the squared norm of a filtered token is that of rounding noise."""
    return filtered_BP <= NOISE**2 * whole_BP.amax(1, keepdim=True)


def _torch_forward(s_spatial, s_frequency, t, basis, weights):
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


def _torch_backward(upstream, s_spatial, s_frequency, t, basis, coef):
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
    forward = _triton_forward if _runs_triton(t) else _torch_forward
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
    """Gradients of `dual_view`, given that of its losses, `upstream` (L, 2), and the coefficients that it returned.

    Returns:
        2 L contiguous tensors, first of the spatial and then of the frequency view, each in the dtype of its input.
    """
    backward = _triton_backward if _runs_triton(t) else _torch_backward
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
    """Weighted losses (L, 2) of any number of stages, in as many launches as their tile needs."""
    per_launch = _tile_for([*s_spatial, *s_frequency, t], basis).stages
    losses = []
    for start in range(0, len(s_spatial), per_launch):
        part = slice(start, start + per_launch)
        factors = [float(w) for pair in weights[part] for w in pair]
        losses.append(dual_view(list(s_spatial[part]), list(s_frequency[part]), t, basis, factors)[0])
    return torch.cat(losses)
