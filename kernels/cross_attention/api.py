"""Entry point of the projector's attention: checks its arguments and picks the implementation."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from scalekd_ds.kernels.cross_attention import reference


def cap_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Multi-head cross attention of the projector (ScaleKD section 3.1).

    Args:
        q: (G, Q, N, D) queries; group g serves the g-th B/G samples: G is 1 where the batch shares one learned query,
            2 where two views are stacked on the batch, B where each sample has its own.
        k: (B, S, N, D) keys; strided views are fine.
        v: (B, S, N, D) values.
        scale: Factor of q k^T, the softmax scale folded in.

    Returns:
        (B, Q, N, D), token-major, so that heads join by a view.

    Raises:
        ValueError: Shapes that do not fit, naming the argument.
    """
    if k.dim() != 4 or k.shape != v.shape:
        raise ValueError(f"k has shape {tuple(k.shape)} and v {tuple(v.shape)}: both must be (B, S, heads, head size).")
    if q.dim() != 4 or q.shape[2:] != k.shape[2:] or k.shape[0] % max(1, q.shape[0]):
        raise ValueError(
            f"q has shape {tuple(q.shape)}: it must be (G, queries, {k.shape[2]}, {k.shape[3]}), G a divisor of "
            f"k's batch, {k.shape[0]}."
        )
    q = reference.expand_groups(q, k.shape[0])
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale)
    return out.transpose(1, 2)
