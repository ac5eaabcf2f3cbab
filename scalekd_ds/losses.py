"""Loss terms: dual-view feature mimicking, logit KD, and the student's own loss on the labels."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from scalekd_ds import kernels


@functools.lru_cache(maxsize=64)
def dct_matrix(size: int) -> torch.Tensor:
    """(size, size) orthonormal DCT-II, one frequency a row, in float64."""
    k = torch.arange(size, dtype=torch.float64)[:, None]
    x = torch.arange(size, dtype=torch.float64)[None, :]
    basis = torch.cos(math.pi * k * (2 * x + 1) / (2 * size)) * math.sqrt(2.0 / size)
    basis[0] /= math.sqrt(2.0)
    return basis


def low_band(grid: tuple[int, int], cut: int) -> torch.Tensor:
    """(h, w) mask of the `cut` x `cut` lowest DCT frequencies, True where dropped.

    Raises:
        ValueError: A cut below 1 or one that leaves no frequency.
    """
    h, w = grid
    if not 1 <= cut <= max(h, w):
        raise ValueError(f"cut is {cut}: it must be between 1 and {max(h, w)} on a {h}x{w} grid.")
    mask = torch.zeros(h, w, dtype=torch.bool)
    mask[:cut, :cut] = True
    return mask


@functools.lru_cache(maxsize=64)
def _basis_of(grid: tuple[int, int], frequencies: tuple[int, ...], device: torch.device, dtype: torch.dtype):
    basis = torch.kron(dct_matrix(grid[0]), dct_matrix(grid[1]))[list(frequencies)]
    return basis.T.contiguous().to(device, dtype)


def frequency_filter(grid: tuple[int, int], cut: int | torch.Tensor, device: torch.device, dtype: torch.dtype):
    """(P, R) basis of the frequencies that the frequency view drops, or None for the DC term alone.

    Args:
        grid: (h, w), with P = h * w tokens.
        cut: Side of the lowest block of DCT frequencies to drop, or an (h, w) bool mask, True where dropped.
        device: Where the tokens are.
        dtype: Of the sums; float32, or float64 for tests.

    Raises:
        ValueError: A mask of another shape, or a cut that drops nothing or everything.
    """
    if isinstance(cut, int) and cut == 1:
        return None
    mask = low_band(grid, cut) if isinstance(cut, int) else cut
    if tuple(mask.shape) != tuple(grid):
        raise ValueError(f"cut has shape {tuple(mask.shape)}: a mask must have the grid's, {tuple(grid)}.")
    dropped = tuple(mask.flatten().nonzero().flatten().tolist())
    if not dropped or len(dropped) == mask.numel():
        raise ValueError(f"cut drops {len(dropped)} of {mask.numel()} frequencies: it must drop some and keep some.")
    return _basis_of(tuple(grid), dropped, device, dtype)


def dual_view_loss(
    s_spatial: torch.Tensor,
    s_frequency: torch.Tensor,
    teacher_tokens: torch.Tensor,
    grid: tuple[int, int],
    weights: tuple[float, float],
    cut: int | torch.Tensor = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dual-view feature mimicking (ScaleKD section 3.2): weighted (spatial, frequency) losses.

    Args:
        s_spatial: (B, P, C) projected student tokens of the spatial view.
        s_frequency: (B, P, C) projected student tokens of the frequency view.
        teacher_tokens: (B, P, C) target of both views.
        grid: (h, w) of the tokens, h * w = P, row by row.
        weights: Factor of each view.
        cut: The frequency view drops the cut x cut lowest DCT frequencies (1: the mean alone), or those where an
            (h, w) bool mask is True.

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
    """`dual_view_loss` of several stages with one target, whose part is computed once for all of them.

    Args:
        stages: (s_spatial, s_frequency) of each stage, (B, P, C) each.
        teacher_tokens: (B, P, C).
        grid: (h, w) of the tokens.
        weights: (spatial, frequency) factors of each stage.
        cut: As in `dual_view_loss`.

    Raises:
        ValueError: As `dual_view_loss`.
    """
    if grid[0] * grid[1] != teacher_tokens.shape[1]:
        raise ValueError(f"grid is {tuple(grid)}: teacher_tokens has {teacher_tokens.shape[1]} tokens.")
    wide = torch.promote_types(teacher_tokens.dtype, torch.float32)
    basis = frequency_filter(tuple(grid), cut, teacher_tokens.device, wide)
    spatial, frequency = zip(*stages, strict=True)
    losses = kernels.dual_view_loss(spatial, frequency, teacher_tokens, basis, weights)
    return [tuple(pair.unbind()) for pair in losses.unbind()]


def logit_kd(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0, weight: float = 1.0
) -> torch.Tensor:
    """-weight tau^2 mean_b sum_c softmax(t/tau) log_softmax(s/tau): cross-entropy to the teacher, a scalar.

    log_softmax keeps it finite at any gap between logits; log(softmax) overflows from a gap of 104 in float32.

    Args:
        student_logits: (B, K).
        teacher_logits: (B, K), taken as constant by the caller.
        temperature: tau.
        weight: The term's factor.

    Raises:
        ValueError: Different shapes.
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
        label_smoothing: For `ce`.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if kind == "ce":
        return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
    if targets.dim() == 1:
        targets = F.one_hot(targets, logits.shape[1])
    return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="sum") / logits.shape[0]
