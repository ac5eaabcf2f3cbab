"""Attention of the cross attention projector in plain PyTorch: the specification.

Shape letters: G query groups (1: one query for the whole batch, or B), B batch, Q queries, S keys, N heads, D head size.
"""

from __future__ import annotations

import torch


def cap_attention(q_GQND: torch.Tensor, k_BSND: torch.Tensor, v_BSND: torch.Tensor, scale: float) -> torch.Tensor:
    """(B, Q, N, D): softmax(scale q k^T) v for each head, a query group of 1 shared by the batch."""
    q_BNQD = q_GQND.transpose(1, 2).expand(k_BSND.shape[0], -1, -1, -1)
    scores_BNQS = scale * (q_BNQD @ k_BSND.permute(0, 2, 3, 1))
    return (scores_BNQS.softmax(-1) @ v_BSND.transpose(1, 2)).transpose(1, 2)
