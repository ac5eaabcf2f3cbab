"""The loss terms: dual-view feature mimicking, logit KD, and the student's own loss on the labels."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from scalekd_ds import kernels


@functools.lru_cache(maxsize=64)
def dct_matrix(size: int) -> torch.Tensor:
    """The orthonormal DCT-II as a matrix (size, size) in float64; row k is frequency k.

    Args:
        size: Tokens along one side of the grid.
    """
    k = torch.arange(size, dtype=torch.float64)[:, None]
    x = torch.arange(size, dtype=torch.float64)[None, :]
    basis = torch.cos(math.pi * k * (2 * x + 1) / (2 * size)) * math.sqrt(2.0 / size)
    basis[0] /= math.sqrt(2.0)
    return basis


def low_band(grid: tuple[int, int], cut: int) -> tuple[int, ...]:
    """The numbers of the `cut` x `cut` lowest DCT frequencies, which are counted row by row of the grid (h, w).

    Raises:
        ValueError: A cut below 1, or above both sides of the grid.
    """
    h, w = grid
    if not 1 <= cut <= max(h, w):
        raise ValueError(f"cut is {cut}: it must be between 1 and {max(h, w)} on a {h}x{w} grid.")
    return tuple(row * w + column for row in range(min(cut, h)) for column in range(min(cut, w)))


@functools.lru_cache(maxsize=64)
def _dct_basis(
    grid: tuple[int, int], frequencies: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """(P, R) columns of the 2D DCT for R frequencies, which are numbered row by row of the grid."""
    basis = torch.kron(dct_matrix(grid[0]), dct_matrix(grid[1]))[list(frequencies)]
    return basis.T.contiguous().to(device, dtype)


def frequency_filter(
    grid: tuple[int, int], cut: int | torch.Tensor, device: torch.device, dtype: torch.dtype
) -> torch.Tensor | None:
    """The orthonormal basis (P, R) of the frequencies that the frequency view drops, or None for the DC term alone.

    Args:
        grid: (h, w), with P = h * w tokens.
        cut: Side of the lowest block of DCT frequencies to drop, or an (h, w) bool mask, True where dropped.
        device: Device of the tokens.
        dtype: Type that the losses are summed in: float32, or float64 in tests.

    Raises:
        ValueError: A mask of another shape, or a cut that drops nothing or everything.
    """
    if isinstance(cut, int) and cut == 1:
        return None
    if isinstance(cut, int):
        dropped = low_band(grid, cut)
    elif tuple(cut.shape) == tuple(grid):
        dropped = tuple(cut.flatten().nonzero().flatten().tolist())
    else:
        raise ValueError(f"cut has shape {tuple(cut.shape)}: a mask must have the grid's, {tuple(grid)}.")
    if not dropped or len(dropped) == grid[0] * grid[1]:
        raise ValueError(
            f"cut drops {len(dropped)} of {grid[0] * grid[1]} frequencies: it must drop some and keep some."
        )
    return _dct_basis(tuple(grid), dropped, device, dtype)


def dual_view_loss(
    s_spatial: torch.Tensor,
    s_frequency: torch.Tensor,
    teacher_tokens: torch.Tensor,
    grid: tuple[int, int],
    weights: tuple[float, float],
    cut: int | torch.Tensor = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dual-view feature mimicking (ScaleKD section 3.2, equation 5 for each view) of one stage.

    Args:
        s_spatial: (B, P, C) projected student tokens of the spatial view.
        s_frequency: (B, P, C) projected student tokens of the frequency view.
        teacher_tokens: (B, P, C) target of both views.
        grid: (h, w) of the tokens, h * w = P, row by row.
        weights: Factor of each view.
        cut: The frequency view drops the cut x cut lowest DCT frequencies (1: the mean alone), or those where an
            (h, w) bool mask is True.

    Returns:
        The weighted spatial and frequency loss, scalars.

    Raises:
        ValueError: A grid that does not match P, shapes that differ, or a cut that drops nothing or everything.
    """
    return dual_view_losses([(s_spatial, s_frequency)], teacher_tokens, grid, [weights], cut)[0]


def dual_view_losses(
    stages: Sequence[tuple[torch.Tensor, torch.Tensor]],
    teacher_tokens: torch.Tensor,
    grid: tuple[int, int],
    weights: Sequence[tuple[float, float]],
    cut: int | torch.Tensor = 1,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """`dual_view_loss` of several stages that share one target; what depends on the target alone is computed once.

    Args:
        stages: (s_spatial, s_frequency) of each stage, (B, P, C) each.
        teacher_tokens: (B, P, C) target of all stages.
        grid: (h, w) of the tokens.
        weights: (spatial, frequency) factors of each stage.
        cut: As in `dual_view_loss`.

    Returns:
        The weighted (spatial, frequency) losses of each stage.

    Raises:
        ValueError: As for `dual_view_loss`.
    """
    num_tokens = teacher_tokens.shape[1]
    if grid[0] * grid[1] != num_tokens:
        raise ValueError(
            f"grid is {tuple(grid)} and teacher_tokens has {num_tokens} tokens: h * w must be their number."
        )
    wide = torch.promote_types(teacher_tokens.dtype, torch.float32)
    basis = frequency_filter((grid[0], grid[1]), cut, teacher_tokens.device, wide)
    spatial, frequency = zip(*stages, strict=True)
    losses = kernels.dual_view_loss(spatial, frequency, teacher_tokens, basis, weights)
    return [(pair[0], pair[1]) for pair in (stage.unbind() for stage in losses.unbind())]


def logit_kd(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0, weight: float = 1.0
) -> torch.Tensor:
    """Logit KD, the cross-entropy to the teacher: -weight tau^2 mean_b sum_k softmax(t/tau) log_softmax(s/tau).

    log_softmax keeps it finite for any logits; the published log(softmax) is infinite from a difference of 104 on.

    Args:
        student_logits: (B, K).
        teacher_logits: (B, K), without gradient.
        temperature: The temperature tau.
        weight: Factor of the loss.

    Returns:
        A scalar, in float32 or wider.

    Raises:
        ValueError: The logits have different shapes.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student_logits has shape {tuple(student_logits.shape)} and teacher_logits {tuple(teacher_logits.shape)}: "
            "KD needs the same classes on both."
        )
    wide = torch.promote_types(student_logits.dtype, torch.float32)
    log_student = F.log_softmax(student_logits.to(wide) / temperature, dim=-1)
    teacher = F.softmax(teacher_logits.to(wide) / temperature, dim=-1)
    return -weight * temperature**2 * (teacher * log_student).sum(-1).mean()


def label_loss(
    logits: torch.Tensor, targets: torch.Tensor, kind: str = "ce", label_smoothing: float = 0.0
) -> torch.Tensor:
    """The student's loss on the labels, a scalar.

    Args:
        logits: (B, K).
        targets: (B,) class indices or (B, K) probabilities.
        kind: `ce`, or `bce`: sigmoid cross-entropy summed over classes and averaged over the batch.
        label_smoothing: Label smoothing of `ce`; `bce` ignores it.

    Returns:
        A scalar, in float32 or wider.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if kind == "ce":
        return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
    if targets.dim() == 1:
        targets = F.one_hot(targets, logits.shape[1])
    return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="sum") / logits.shape[0]
