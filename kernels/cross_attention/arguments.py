"""The check of the attention's arguments, which the entry point and the operator share."""

from __future__ import annotations

import torch


def check_arguments(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Raises a ValueError that names the argument where q, k and v are not what `api.cap_attention` takes."""
    if k.dim() != 4 or k.shape != v.shape:
        raise ValueError(f"k has shape {tuple(k.shape)} and v {tuple(v.shape)}: both must be (B, S, heads, head size).")
    if q.dim() != 4 or q.shape[2:] != k.shape[2:] or not q.shape[0] or k.shape[0] % q.shape[0]:
        raise ValueError(
            f"q has shape {tuple(q.shape)}: it must be (G, queries, {k.shape[2]}, {k.shape[3]}), G a divisor of "
            f"k's batch, {k.shape[0]}."
        )
    for name, x in (("q", q), ("v", v)):
        if x.dtype != k.dtype:
            raise ValueError(f"{name} has dtype {x.dtype}: it must have k's, {k.dtype}.")
        if x.device != k.device:
            raise ValueError(f"{name} is on {x.device}: it must be on k's device, {k.device}.")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.shape[3] > 1 and x.stride(3) != 1:
            raise ValueError(
                f"{name} has strides {x.stride()}: its head size must be contiguous, stride 1; .contiguous()?"
            )
