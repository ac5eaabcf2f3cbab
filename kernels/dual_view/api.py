"""Entry point of the dual-view loss: checks its arguments and picks the implementation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from scalekd_ds.kernels.dual_view import reference

Tokens = torch.Tensor | Sequence[torch.Tensor]


def implementation(device: str, dtypes: set[torch.dtype], tokens: int, rank: int | None) -> str:
    """`triton` where the kernels take the tensors, else `reference`.

    Args:
        device: Device type, such as `cuda`.
        dtypes: Types of all tensors.
        tokens: P.
        rank: Rank of the filter; None for the mean alone.
    """
    if device != "cuda" or not dtypes <= {torch.float32, torch.bfloat16, torch.float16}:
        return "reference"
    # imported here, so that Triton is not imported where there is no GPU to use it
    from scalekd_ds.kernels.dual_view.launch import kind_of

    return "reference" if kind_of(tokens, rank) is None else "triton"


def _check_matches_target(name: str, s: torch.Tensor, t: torch.Tensor) -> None:
    if s.shape != t.shape:
        raise ValueError(f"{name} has shape {tuple(s.shape)}: it must equal t's, {tuple(t.shape)}.")
    if s.device != t.device:
        raise ValueError(f"{name} is on {s.device}: it must be on t's device, {t.device}.")


def _check_dtype_and_strides(name: str, x: torch.Tensor) -> None:
    if not x.is_floating_point():
        raise ValueError(f"{name} has dtype {x.dtype}: it must be a floating point type.")
    if x.shape[2] > 1 and x.stride(2) != 1:
        raise ValueError(f"{name} has strides {x.stride()}: its channels must be contiguous, stride 1; .contiguous()?")


def dual_view_loss(
    s_spatial: Tokens,
    s_frequency: Tokens,
    t: torch.Tensor,
    filter: torch.Tensor | None = None,
    weights: Sequence[float] | Sequence[Sequence[float]] = (1.0, 1.0),
) -> torch.Tensor:
    """Both views of feature mimicking (ScaleKD section 3.2), for one stage or for several that share the target.

    In the frequency view, a token whose norm after the filter is below 1e-6 of its sample's largest token counts as
    zero and passes no gradient: it is rounding noise, as of a map that is constant over tokens. A token of zeros has
    the gradient of F.normalize, about 1e12, which saturates in float16.

    Args:
        s_spatial: (B, P, C) projected student tokens of the spatial view; or L such tensors, one for each stage.
        s_frequency: (B, P, C) projected student tokens of the frequency view; or L such tensors.
        t: (B, P, C) teacher tokens, the target of all. Where they require a gradient, the reference runs.
        filter: (P, R) orthonormal basis of what the frequency view drops; None drops the mean over tokens alone.
        weights: (spatial, frequency) factors; or L such pairs, one for each stage.

    Returns:
        The weighted spatial and frequency loss (2,), or (L, 2) of L stages; in float32 or wider.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit, channels that are not contiguous, or a filter that cuts
            everything, naming the argument.
    """
    single = isinstance(s_spatial, torch.Tensor)
    # checked below: types do not say that all three are of one stage, or all of several
    spatial: Any
    frequency: Any
    pairs: Any
    spatial, frequency, pairs = ([s_spatial], [s_frequency], [weights]) if single else (s_spatial, s_frequency, weights)
    if t.dim() != 3:
        raise ValueError(f"t has shape {tuple(t.shape)}: it must be (batch, tokens, channels).")
    if not len(spatial) == len(frequency) == len(pairs) or not len(spatial):
        raise ValueError(
            f"s_spatial has {len(spatial)} stages, s_frequency {len(frequency)} and weights {len(pairs)}: they must be "
            "as many, and at least one."
        )
    for pair in pairs:
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise ValueError(f"weights is {weights}: it must be (spatial, frequency), a pair for each stage.")
    _check_dtype_and_strides("t", t)
    for name, group in (("s_spatial", spatial), ("s_frequency", frequency)):
        for s in group:
            _check_matches_target(name, s, t)
            _check_dtype_and_strides(name, s)
    if filter is not None:
        if filter.dim() != 2 or filter.shape[0] != t.shape[1]:
            raise ValueError(f"filter has shape {tuple(filter.shape)}: it must be ({t.shape[1]}, rank).")
        if not 0 < filter.shape[1] < t.shape[1]:
            dropped = "everything" if filter.shape[1] else "nothing"
            raise ValueError(f"filter has rank {filter.shape[1]}: it cuts {dropped}; it must be 1 to {t.shape[1] - 1}.")
        if filter.device != t.device:
            raise ValueError(f"filter is on {filter.device}: it must be on t's device, {t.device}.")

    dtypes = {x.dtype for x in (*spatial, *frequency, t)}
    rank = None if filter is None else filter.shape[1]
    chosen = implementation(t.device.type, dtypes, t.shape[1], rank)
    if chosen == "reference" or t.requires_grad:
        losses = reference.dual_view_loss(spatial, frequency, t, filter, pairs)
    else:
        from scalekd_ds.kernels.dual_view.ops import dual_view_stages

        losses = dual_view_stages(spatial, frequency, t, filter, pairs)
    return losses[0] if single else losses
