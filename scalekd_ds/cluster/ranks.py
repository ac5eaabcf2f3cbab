"""Who started this process: its rank, from what launchers, SLURM and MPI say in the environment, or none."""

from __future__ import annotations

import os
import re
import socket
import zlib
from collections.abc import Mapping
from typing import NamedTuple

from scalekd_ds.errors import UserError

_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
# as text, for the lines that say what to do
_COMMANDS = "start one process with `scalekd train --gpus N`, or the ranks with deepspeed, torchrun, srun or mpirun"


class _Tasks(NamedTuple):
    """One task of several that somebody started together; `address` is where rank 0 runs, None where nobody says."""

    starter: str
    rank: int
    local_rank: int
    world_size: int
    address: str | None
    identity: str


def join_ranks() -> None:
    """Sets the variables of this process's rank, as `torchrun` does, for a job of any launcher or a process alone.

    Raises:
        UserError: The variables contradict each other, some are missing, or one of them is left over from another job.
    """
    os.environ.update(rank_variables(os.environ))


def rank_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT of the process whose environment is given.

    Raises:
        UserError: As `join_ranks`.
    """
    given = {name: _number(environment, name) for name in _NAMES if environment.get(name)}
    tasks = started_together(environment)
    if "RANK" not in given:
        if tasks is None:
            return _alone(given)
        if given.get("WORLD_SIZE", tasks.world_size) != tasks.world_size:
            raise UserError(
                f"WORLD_SIZE is {given['WORLD_SIZE']} and RANK is not set, while {tasks.starter} has started "
                f"{tasks.world_size} tasks: unset WORLD_SIZE, which another job has left over."
            )
        given = dict(zip(_NAMES, (tasks.rank, tasks.local_rank, tasks.world_size), strict=True))
    return _complete(given, environment, tasks)


def _alone(given: dict[str, int]) -> dict[str, str]:
    """The variables of a job of one rank, at a port of its own."""
    for name, value in given.items():
        if value != (1 if name == "WORLD_SIZE" else 0):
            raise UserError(
                f"{name} is {value} and RANK is not set, so this process would wait for others that nobody starts: unset "
                f"{name}, or {_COMMANDS}."
            )
    # whatever another job has left over of MASTER_ADDR and MASTER_PORT
    return _variables(0, 0, 1, "127.0.0.1", str(free_port()))


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _complete(given: dict[str, int], environment: Mapping[str, str], tasks: _Tasks | None) -> dict[str, str]:
    """Adds what is missing beside RANK, from the tasks of SLURM or MPI where those are the ranks."""
    rank, world_size = given["RANK"], given.get("WORLD_SIZE")
    if world_size is None:
        raise UserError(f"RANK is {rank} and WORLD_SIZE is not set: unset RANK to train alone, or {_COMMANDS}.")
    if not 0 <= rank < world_size:
        raise UserError(f"RANK is {rank} and WORLD_SIZE {world_size}: ranks are numbered from 0 to {world_size - 1}.")
    same = tasks is not None and (tasks.rank, tasks.world_size) == (rank, world_size)
    local_rank = given.get("LOCAL_RANK", tasks.local_rank if same else 0 if world_size == 1 else None)
    if local_rank is None:
        raise UserError(
            f"RANK is {rank} and WORLD_SIZE {world_size}, but LOCAL_RANK is not set, which chooses the GPU: set it to the "
            "rank's number on its node."
        )
    if not 0 <= local_rank < world_size:
        raise UserError(f"LOCAL_RANK is {local_rank} and WORLD_SIZE {world_size}: it must be below that.")
    address, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")
    if not address:
        address = tasks.address if same else "127.0.0.1" if world_size == 1 else None
    if not address:
        raise UserError(
            f"RANK is {rank} and WORLD_SIZE {world_size}, but MASTER_ADDR is not set: set it on every rank to the name of "
            "the node of rank 0 (mpirun -x MASTER_ADDR=NODE)."
        )
    if port:
        if not 0 < _number(environment, "MASTER_PORT") < 65_536:
            raise UserError(
                f"the environment variable MASTER_PORT is {port!r}: a port is a number from 1 to 65535 (--master_port of the "
                "launcher)."
            )
    elif world_size == 1:
        port = str(free_port())
    elif same:
        # the same one on every rank, and seldom that of another job on the same nodes
        port = str(15_000 + zlib.crc32(tasks.identity.encode()) % 15_000)
    else:
        raise UserError(
            f"RANK is {rank} and WORLD_SIZE {world_size}, but MASTER_PORT is not set: set it on every rank to a free port "
            f"of {address}."
        )
    return _variables(rank, local_rank, world_size, address, port)


def _variables(rank: int, local_rank: int, world_size: int, address: str, port: str) -> dict[str, str]:
    numbers = {"RANK": str(rank), "LOCAL_RANK": str(local_rank), "WORLD_SIZE": str(world_size)}
    return numbers | {"MASTER_ADDR": address, "MASTER_PORT": port}


def started_together(environment: Mapping[str, str]) -> _Tasks | None:
    """The task of an srun or mpirun of several tasks that this process is; None where there is no such thing."""
    # a script under sbatch is a step of one task, whatever SLURM_NTASKS says
    if _count(environment, "SLURM_STEP_NUM_TASKS") > 1 and "SLURM_PROCID" in environment:
        step = f"{environment.get('SLURM_JOB_ID', '')}.{environment.get('SLURM_STEP_ID', '')}"
        nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST", "")
        numbers = (_number(environment, f"SLURM_{name}") for name in ("PROCID", "LOCALID", "STEP_NUM_TASKS"))
        return _Tasks("srun", *numbers, first_node(nodes), step)
    if _count(environment, "OMPI_COMM_WORLD_SIZE") > 1:
        numbers = [_number(environment, f"OMPI_COMM_WORLD_{name}") for name in ("RANK", "LOCAL_RANK", "SIZE")]
        here = _count(environment, "OMPI_COMM_WORLD_LOCAL_SIZE") == numbers[2]
        job = environment.get("PMIX_NAMESPACE") or environment.get("OMPI_MCA_ess_base_jobid") or str(os.getppid())
        return _Tasks("mpirun", *numbers, "127.0.0.1" if here else None, job)
    if _count(environment, "PMI_SIZE") > 1 and "MPI_LOCALRANKID" in environment:
        numbers = [_number(environment, name) for name in ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE")]
        here = _count(environment, "MPI_LOCALNRANKS") == numbers[2]
        return _Tasks("mpirun", *numbers, "127.0.0.1" if here else None, str(os.getppid()))
    return None


def first_node(nodes: str) -> str | None:
    """The first name of a list as SLURM writes it: `gpu07` of `gpu[07-12,20],login1`; None of an empty list."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0]) if first else None


def _count(environment: Mapping[str, str], name: str) -> int:
    """The variable's number, 0 where there is none."""
    return _number(environment, name) if environment.get(name) else 0


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    if not re.fullmatch(r"\d{1,9}", value.strip()):
        raise UserError(f"the environment variable {name} is {value!r}: it must be a whole number.")
    return int(value)
