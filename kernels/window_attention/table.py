"""The table of measurements: where the Triton kernels of window attention are faster than PyTorch's SDPA."""

from __future__ import annotations

import json
from pathlib import Path

import torch

# written by benchmarks/kernels.py on a GPU: `key_of` a shape -> "triton" or "sdpa"
PATH = Path(__file__).with_name("table.json")


def key_of(architecture: int, head_size: int, tokens: int, shifted: bool, gradient: bool, dtype: torch.dtype) -> str:
    """A shape's name in the table, such as `sm_90/d32/t49/shifted/forward/bfloat16`.

    Args:
        architecture: Compute capability of the GPU, 90 for sm_90.
        head_size: D.
        tokens: T, of a window.
        shifted: Whether windows are shifted, for which SDPA needs the constant once for each image.
        gradient: Whether it goes backward too.
        dtype: Type of q, k and v.
    """
    shift, direction = "shifted" if shifted else "whole", "backward" if gradient else "forward"
    return f"sm_{architecture}/d{head_size}/t{tokens}/{shift}/{direction}/{str(dtype).removeprefix('torch.')}"


# read at import: torch.compile traces the entry point, and cannot open a file there
_MEASURED = json.loads(PATH.read_text())


def measured() -> dict[str, str]:
    """The table that is shipped: `key_of` a shape -> the faster implementation."""
    return _MEASURED
