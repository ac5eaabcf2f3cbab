"""Whether a run on GPUs is repeatable bit for bit, or as fast as cuDNN can be; on CPUs a run always is repeatable."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from scalekd_ds.errors import UserError

# the workspaces with which cuBLAS gives the same numbers on any stream
_WORKSPACE, _REPEATABLE = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")


def choose_algorithms(deterministic: bool, device_type: str) -> None:
    """Sets how torch chooses among its algorithms; call it before the first work on a GPU.

    Images have one size in a run, so cuDNN may try its convolutions once for each shape and keep the fastest. Which one that
    is differs from start to start, and with it the last bits of the numbers: a deterministic run does without.

    Args:
        deterministic: `run.deterministic`: only algorithms that give the same numbers again. SDPA leaves out cuDNN's
            attention, and the backward passes of the others add in a fixed order.
        device_type: `cuda` or `cpu`; on CPUs nothing is set, since their algorithms give the same numbers anyway.
    """
    if device_type != "cuda":
        return
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.deterministic = deterministic
    # not as warnings alone: attention's backward passes would then still add in any order
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        if os.environ.get(_WORKSPACE) not in _REPEATABLE:
            # cuBLAS reads it when it starts
            os.environ[_WORKSPACE] = _REPEATABLE[0]
        # it is filled to find reads of memory that nobody wrote, for a kernel in each allocation
        settings: Any = torch.utils.deterministic
        settings.fill_uninitialized_memory = False


@contextmanager
def naming_the_setting(deterministic: bool) -> Iterator[None]:
    """A context in which an operator without a deterministic algorithm ends the run with a line that names the setting.

    Raises:
        UserError: Such an operator ran, and `deterministic` is true.
    """
    try:
        yield
    except RuntimeError as error:
        operator, alert, _ = str(error).partition(" does not have a deterministic implementation")
        if not (deterministic and alert):
            raise
        raise UserError(
            f"run.deterministic is true, and {operator} has no algorithm on this GPU that gives the same numbers again: "
            "set --run.deterministic false, or choose another student or projector."
        ) from error
