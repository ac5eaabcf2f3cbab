"""What a part needs, and the line that says what to lay where."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

import torch

# package of a need -> the name under which `pack_wheels.py pack` takes its wheels along
_PACKAGES = {"deepspeed": "deepspeed", "nvidia.dali": "dali", "jsonargparse": "deepspeed", "pytest": "pytest"}


def _is_there(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        # its parent is missing
        return False


def missing(needs: Iterable[str], dry: bool) -> list[str]:
    """A line for everything in `needs` that is not there; a dry run needs no GPU."""
    lines = []
    for need in needs:
        if need == "gpu":
            if not (dry or torch.cuda.is_available()):
                lines.append("no CUDA device here: --dry-run walks the parts without one")
        elif not _is_there(need):
            pack = f"pack_wheels.py pack {_PACKAGES.get(need, need)}"
            lines.append(
                f"{need} is not installed: lay the pieces of `{pack}` beside the repository, run `python "
                "benchmarks/pack_wheels.py join PIECES --into DIR`, and set PYTHONPATH=DIR"
            )
    return lines
