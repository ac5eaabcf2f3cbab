"""The table of measurements: where the Triton kernels of LAMB are faster than PyTorch's operations."""

from __future__ import annotations

import json
from pathlib import Path

# written by benchmarks/kernels.py on a GPU: `key_of` a kind of step -> "triton" or "torch"
PATH = Path(__file__).with_name("table.json")


def key_of(architecture: int, flat: bool) -> str:
    """The name of a kind of step in the table, such as `sm_90/layers`.

    Args:
        architecture: Compute capability of the GPU, 90 for sm_90.
        flat: Whether layers lie in one flat tensor, as in ZeRO's shards, or each in a tensor of its own.
    """
    return f"sm_{architecture}/{'flat' if flat else 'layers'}"


_MEASURED = json.loads(PATH.read_text())


def measured() -> dict[str, str]:
    """The table that is shipped: `key_of` a kind of step -> the faster implementation."""
    return _MEASURED
