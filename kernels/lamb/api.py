"""Picks the implementation of LAMB's step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from scalekd_ds.kernels.cross_attention.table import architecture_of
from scalekd_ds.kernels.lamb import table


def implementation(device: str, architecture: int, flat: bool, measured: dict[str, str]) -> str:
    """`triton` where it was measured to be the faster one, else `torch`, PyTorch's operations.

    Args:
        device: Device type, such as `cuda`.
        architecture: Compute capability of a GPU, 90 for sm_90.
        flat: Whether layers lie in one flat tensor, as in ZeRO's shards, or each in a tensor of its own.
        measured: The table of measurements, `table.measured()`.
    """
    return "triton" if device == "cuda" and measured.get(table.key_of(architecture, flat)) == "triton" else "torch"


def runs_triton(weights: Sequence[torch.Tensor]) -> bool:
    """Whether the kernels take the step of these weights, all of one type and on one device.

    They take float32 in contiguous memory, which the weights that an optimizer updates are.
    """
    device = weights[0].device
    if device.type != "cuda" or weights[0].dtype != torch.float32 or not all(w.is_contiguous() for w in weights):
        return False
    return implementation("cuda", architecture_of(device), len(weights) == 1, table.measured()) == "triton"
