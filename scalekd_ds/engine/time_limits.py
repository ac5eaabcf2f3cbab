"""Leaves it to the heartbeat to end a job whose ranks hang or are lost: it names them, which torch's own limits do not.

A collective that waits for ten minutes raises an error on gloo, and under NCCL a thread of torch ends the process by SIGABRT.
Both come before `run.hang_timeout`, and the second one at once where a peer has died.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from datetime import timedelta

import torch
from torch.distributed import distributed_c10d

# for ever, for a job; milliseconds of 25 days and more are no 32-bit integer, in which system calls take them
NO_LIMIT = timedelta(days=14)
# no handling of errors by the thread that watches NCCL, and no end of the process where that thread itself is stuck
_WATCHDOG = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}
# older names, which torch reads as well
_OLD_NAMES = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "NCCL_ASYNC_ERROR_HANDLING"}
# torchrun sets it on every rank where the user has not
_OF_TORCHRUN = ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")


def silence_watchdog(environment: MutableMapping[str, str]) -> None:
    """Has torch's NCCL threads end no process; call it before the process group is made. What the user has set stays.

    Args:
        environment: `os.environ`.
    """
    name, value = _OF_TORCHRUN
    if "TORCHELASTIC_RUN_ID" in environment and environment.get(name) == value:
        del environment[name]
    for name, value in _WATCHDOG.items():
        if _OLD_NAMES.get(name, name) not in environment:
            environment.setdefault(name, value)


def lift_time_limits() -> None:
    """Gives the collectives of all process groups that there are, and the store, so much time that no job reaches it.

    Call it where a heartbeat watches, and again once more groups are made: DeepSpeed gives its groups no limit of its own,
    so that they have torch's defaults.
    """
    if not torch.distributed.is_initialized():
        return
    # public from torch 2.14 on
    set_timeout = getattr(torch.distributed, "set_timeout", None) or distributed_c10d._set_pg_timeout
    for group in list(distributed_c10d._world.pg_map):
        set_timeout(NO_LIMIT, group)
    distributed_c10d._get_default_store().set_timeout(NO_LIMIT)


def nccl_error() -> str | None:
    """What NCCL reports of its connections on this rank, whose collectives never end then; None where all is well."""
    if not torch.distributed.is_initialized():
        return None
    device = torch.device("cuda")
    for group in list(distributed_c10d._world.pg_map):
        if device not in group._device_types or torch.distributed.get_backend(group) != "nccl":
            continue
        try:
            error = group._get_backend(device).get_error()
        except RuntimeError:
            # a backend that does not tell
            continue
        # a limit that the user has kept is no error of the network
        if error.name in ("COMM_ERROR", "REMOTE_ERROR"):
            return f"NCCL reports {error.name} of process group {group.group_name}"
    return None
