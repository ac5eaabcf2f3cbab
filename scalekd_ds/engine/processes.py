"""Joins this process to the ranks of its job, and gives access to the store that they share."""

from __future__ import annotations

import itertools
import os
import sys
import threading
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

from scalekd_ds.cluster.doctor.agent import follow_nccl
from scalekd_ds.cluster.ranks import cores_of_this_rank, free_port, join_ranks
from scalekd_ds.cluster.rendezvous import check_meeting_place, meeting
from scalekd_ds.engine.build_locks import clear_build_locks
from scalekd_ds.engine.host_memory import keep_freed_memory
from scalekd_ds.engine.time_limits import silence_watchdog

# every rank begins the same runs in the same order
_runs = itertools.count()
# seconds in which all ranks that have finished should have closed their connections
_CLOSE_S = 30.0
# the process groups that were made here, and not by who uses this library
_own: list[Any] = []


def start_processes() -> torch.device:
    """Joins the process group of the job, or starts one of a single rank where no launcher set the ranks; collective.

    Returns:
        The device of this rank.

    Raises:
        UserError: The environment has a part of what a launcher sets, or what another job has left over; or the ranks cannot
            meet, such as at a port that is in use.
    """
    join_ranks()
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cores_of_this_rank(os.environ))
    is_own = not torch.distributed.is_initialized()
    if is_own:
        check_meeting_place()
        silence_watchdog(os.environ)
        follow_nccl(os.environ)
    if os.environ["LOCAL_RANK"] == "0":
        clear_build_locks()
    # DeepSpeed's all-reduce through shared memory on CPUs, with which split models are served and nothing is trained. It would
    # be compiled here, for a minute, and map 66 MB of /dev/shm a rank: where that is small the ranks crash or wait for ever
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with meeting():
        deepspeed.init_distributed(verbose=False)
    if is_own:
        _own[:] = [torch.distributed.group.WORLD]
    local_rank = int(os.environ["LOCAL_RANK"])
    if accelerator.device_name() == "cpu":
        keep_freed_memory()
        return torch.device("cpu")
    accelerator.set_device(local_rank)
    return torch.device(accelerator.device_name(), local_rank)


def end_processes() -> None:
    """Closes the connections to the other ranks, where `start_processes` has made them; collective, at the end of a command.

    NCCL would warn at the exit of the process that nobody did. Only ranks that have finished call it: it waits for the
    others, and one of them may have been killed since, so that a process which waits for long is ended, as finished.
    """
    if not _own or torch.distributed.group.WORLD is not _own.pop():
        return
    closed = threading.Event()
    threading.Thread(target=_end_unless, args=(closed,), name="closing", daemon=True).start()
    alone = dist.get_world_size() == 1
    dist.destroy_process_group()
    closed.set()
    if alone:
        # the store serves at its port for as long as anything of the last run refers to it
        os.environ["MASTER_PORT"] = str(free_port())


def _end_unless(closed: threading.Event) -> None:
    """Body of a thread: ends a process that does not come out of NCCL."""
    if not closed.wait(_CLOSE_S):
        sys.stdout.flush()
        os._exit(0)


def job_store() -> Any:
    """A part of torch's key-value store, which rank 0 serves, for one run; None where the job has one rank; collective.

    No earlier run of the same processes has written there: its keys would pass for answers of this run's ranks.
    """
    if dist.get_world_size() == 1:
        return None
    store = torch.distributed.distributed_c10d._get_default_store()
    return torch.distributed.PrefixStore(f"scalekd/run{next(_runs)}", store)
