"""The projector's attention in plain PyTorch: its specification.

Shape letters: B batch, G query groups (each serves B/G consecutive samples), Q queries, S keys, N heads, D head size.
"""

from __future__ import annotations

import torch


def expand_groups(q_GQND: torch.Tensor, batch: int) -> torch.Tensor:
    """(batch, Q, N, D): repeats each group's queries for its samples; no copy where G is 1 or `batch`."""
    groups = q_GQND.shape[0]
    if groups in (1, batch):
        return q_GQND.expand(batch, -1, -1, -1)
    return q_GQND.repeat_interleave(batch // groups, 0)


def cap_attention(q_GQND: torch.Tensor, k_BSND: torch.Tensor, v_BSND: torch.Tensor, scale: float) -> torch.Tensor:
    """The projector's attention (ScaleKD section 3.1): softmax(scale q k^T) v for each head.

    Args:
        q_GQND: (G, Q, N, D) queries: those of group g serve the g-th B/G samples.
        k_BSND: (B, S, N, D) keys.
        v_BSND: (B, S, N, D) values.
        scale: Factor of q k^T.

    Returns:
        (B, Q, N, D).
    """
    q_BNQD = expand_groups(q_GQND, k_BSND.shape[0]).transpose(1, 2)
    scores_BNQS = scale * (q_BNQD @ k_BSND.permute(0, 2, 3, 1))
    return (scores_BNQS.softmax(-1) @ v_BSND.transpose(1, 2)).transpose(1, 2)
