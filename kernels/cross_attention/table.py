"""Which implementation of the attention is the faster one, where it was measured."""

from __future__ import annotations

import json
from pathlib import Path

import torch

# written by benchmarks/kernels.py on a GPU: key -> "triton" or "sdpa"
PATH = Path(__file__).with_name("table.json")


def key_of(architecture: int, head_size: int, queries: int, keys: int, shared: bool, dtype: torch.dtype) -> str:
    """A shape's name in the table, as `sm_90/d32/q49/k49/shared/bfloat16`; `shared`: fewer queries than samples."""
    kind = "shared" if shared else "per_sample"
    return f"sm_{architecture}/d{head_size}/q{queries}/k{keys}/{kind}/{str(dtype).removeprefix('torch.')}"


# read at import: torch.compile traces the entry point, and cannot open a file there
_MEASURED = json.loads(PATH.read_text())


def measured() -> dict[str, str]:
    """The shipped table."""
    return _MEASURED


@torch.compiler.assume_constant_result
def architecture_of(device: torch.device) -> int:
    """Compute capability of a CUDA device, 90 for sm_90."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
