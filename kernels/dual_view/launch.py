"""Launches of the dual-view loss's kernels: which sizes they take, their tiles, filters and arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton

from scalekd_ds.kernels.dual_view import triton_kernels as kernels
from scalekd_ds.kernels.dual_view.reference import EPS, NOISE
from scalekd_ds.kernels.interpreted import INTERPRETED

# largest P, and largest rank of a filter that is applied column by column, that the kernels take
MAX_TOKENS, MAX_RANK = 1024, 64
# largest padded P for which a filter is a matrix product: the operands of a larger one spill
MAX_DOT_TOKENS = 128
# what strides and channels must be multiples of: with others, the kernels spill registers
ALIGNMENT = 16


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


def _known_kind(tokens: int, rank: int | None) -> int:
    kind = kind_of(tokens, rank)
    if kind is None:
        raise ValueError(f"{tokens} tokens with a filter of rank {rank} are more than the kernels take.")
    return kind


def tile_of(tokens: int, rank: int | None, itemsize: int) -> Tile:
    """The tile of a launch, for arguments that `kind_of` has a kind for.

    Args:
        tokens: P.
        rank: Rank of the filter; None for the mean alone.
        itemsize: Bytes of one number of the widest tensor.
    """
    kind, size = _known_kind(tokens, rank), max(64, padded(tokens))
    if (kind, size) == (kernels.MEAN, 256) and itemsize == 2:
        return Tile(size, 32, 16)
    return Tile(size, *_TILES[kind, size])


def tile_for(tensors: Sequence[torch.Tensor], basis: torch.Tensor | None) -> Tile:
    """The tile of a launch with these tensors (B, P, C) and the filter's basis (P, R)."""
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
        matrix, kind, width = basis.float().contiguous(), _known_kind(tokens, rank), rank
        if kind == kernels.DENSE:
            # in float64, a product that neither autocast nor tf32 rounds
            wide = basis.double()
            matrix, width = torch.eye(tokens, device=basis.device) - (wide @ wide.T).float(), tokens
        if len(_filter_cache) >= 16:
            _filter_cache.clear()
        # the basis is kept with its filter, so that no other tensor can get its id
        _filter_cache[id(basis)] = (basis, Filter(kind, matrix, width, _drops_mean(basis)))
    return _filter_cache[id(basis)][1]


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """`x` (B, P, C), or a copy of it where the kernels would spill: with C a multiple of 16, and contiguous.

    Channels of zeros change no norm, no product and no mean of the others. Teachers have channels and strides that
    need no copy.
    """
    C = x.shape[2]
    if C % ALIGNMENT:
        return F.pad(x, (0, -C % ALIGNMENT))
    offset = x.storage_offset() * x.element_size()
    if offset % ALIGNMENT or any(stride % ALIGNMENT for stride in _strides(x)):
        return x.clone(memory_format=torch.contiguous_format)
    return x


def _strides(x: torch.Tensor) -> list[int]:
    """The strides of samples and tokens; 0 along an axis of one, whose stride PyTorch leaves as it comes."""
    return [stride if size > 1 else 0 for stride, size in zip(x.stride()[:2], x.shape[:2], strict=True)]


def _launch_arguments(
    s_spatial: Sequence[torch.Tensor], s_frequency: Sequence[torch.Tensor], t: torch.Tensor, basis: torch.Tensor | None
) -> tuple[list, list, dict, dict]:
    """Pointers, strides, constants and options that forward and backward share.

    The kernels have arguments for two stages: a single stage is passed twice, and L = 1 ignores the second.
    """
    t = _aligned(t)
    students = [_aligned(x) for pair in zip(s_spatial, s_frequency, strict=True) for x in pair]
    students = students if len(students) == 4 else students * 2
    filter_ = filter_of(basis)
    tile = tile_for([*students, t], basis)
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
    strides = [stride for x in (*students, t) for stride in _strides(x)]
    return [*students, t, t if filter_.matrix is None else filter_.matrix], strides, constants, options


def forward(
    s_spatial: Sequence[torch.Tensor],
    s_frequency: Sequence[torch.Tensor],
    t: torch.Tensor,
    basis: torch.Tensor | None,
    weights: Sequence[float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """`ops.dual_view` by the Triton kernels: its arguments, (B, P, C) tokens, and what it returns."""
    (B, P, _), L = t.shape, len(s_spatial)
    pointers, strides, constants, options = _launch_arguments(s_spatial, s_frequency, t, basis)
    splits = 4 if 4 * constants["BC"] <= constants["C"] else 1
    sums = t.new_empty(B, splits, 2 + 5 * L, P, dtype=torch.float32)
    coef = t.new_empty(L, B, 4, P, dtype=torch.float32)
    loss = t.new_empty(B, L, 2, dtype=torch.float32)
    # as for the students: a single stage is passed twice
    weights_over_batch = [w / B for w in (*weights, *weights)[:4]]
    # Triton launches on the current device, whatever the tensors' own is
    with torch.cuda.device_of(t):
        kernels.dual_view_sums_kernel[(B, splits)](*pointers, sums, *strides, P, K=splits, **constants, **options)
        kernels.dual_view_finish_kernel[(B,)](
            sums, coef, loss, *weights_over_batch, P, K=splits, L=L, BP=constants["BP"], EPS=EPS, NOISE=NOISE**2,
            num_warps=1 if P <= 256 else 4, enable_fp_fusion=True,
        )  # fmt: skip
    return loss.sum(0), coef


def backward(
    upstream: torch.Tensor,
    s_spatial: Sequence[torch.Tensor],
    s_frequency: Sequence[torch.Tensor],
    t: torch.Tensor,
    basis: torch.Tensor | None,
    coef: torch.Tensor,
) -> list[torch.Tensor]:
    """`ops.dual_view_backward` by the Triton kernels: its arguments, and 2 L gradients (B, P, C)."""
    B, P, C = t.shape
    pointers, strides, constants, options = _launch_arguments(s_spatial, s_frequency, t, basis)
    padded_C = constants["C"]
    gradients = [
        torch.empty(B, P, padded_C, device=t.device, dtype=x.dtype)
        for pair in zip(s_spatial, s_frequency, strict=True)
        for x in pair
    ]
    out = gradients if len(gradients) == 4 else gradients * 2
    with torch.cuda.device_of(t):
        kernels.dual_view_backward_kernel[(B, triton.cdiv(padded_C, constants["BC"]))](
            *pointers, coef, upstream.float().contiguous(), *out, *strides, P, **constants, **options
        )  # fmt: skip
    gradients = [x[..., :C].contiguous() for x in gradients]
    return gradients[0::2] + gradients[1::2]
