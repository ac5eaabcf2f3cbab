"""The table of measurements: which implementation of the attention is the faster one for a shape."""

from __future__ import annotations

import json
from pathlib import Path

import torch

# written by benchmarks/kernels.py on a GPU: `key_of` a shape -> "triton" or "sdpa"
PATH = Path(__file__).with_name("table.json")


def key_of(architecture: int, head_size: int, queries: int, keys: int, shared: bool, dtype: torch.dtype) -> str:
    """A shape's name in the table, such as `sm_90/d32/q49/k49/shared/bfloat16`.

    Args:
        architecture: Compute capability of the GPU, 90 for sm_90.
        head_size: D.
        queries: Q.
        keys: S.
        shared: Whether a query serves more than one sample.
        dtype: Type of q, k and v.
    """
    kind = "shared" if shared else "per_sample"
    return f"sm_{architecture}/d{head_size}/q{queries}/k{keys}/{kind}/{str(dtype).removeprefix('torch.')}"


# read at import: torch.compile traces the entry point, and cannot open a file there
_MEASURED = json.loads(PATH.read_text())


def measured() -> dict[str, str]:
    """The table that is shipped: `key_of` a shape -> the faster implementation."""
    return _MEASURED


@torch.compiler.assume_constant_result
def architecture_of(device: torch.device) -> int:
    """Compute capability of a CUDA device, 90 for sm_90."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
