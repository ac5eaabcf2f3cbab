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


class _Names(NamedTuple):
    """The variables in which a launcher of MPI's kind tells its tasks who they are; `local_size` may be empty."""

    starter: str
    rank: str
    local_rank: str
    size: str
    local_size: str


# Spectrum MPI's jsrun sets Open MPI's, and Cray's PALS has its own beside those of PMI
_MPI = (
    _Names("mpirun", *(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "LOCAL_RANK", "SIZE", "LOCAL_SIZE"))),
    _Names("mpirun", *(f"MV2_COMM_WORLD_{name}" for name in ("RANK", "LOCAL_RANK", "SIZE", "LOCAL_SIZE"))),
    _Names("mpirun", "PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE", "MPI_LOCALNRANKS"),
    _Names("mpiexec", "PMI_RANK", "PMI_LOCAL_RANK", "PMI_SIZE", "PMI_LOCAL_SIZE"),
    _Names("mpiexec", "PALS_RANKID", "PALS_LOCAL_RANKID", "PMI_SIZE", "PALS_LOCAL_SIZE"),
    _Names("jsrun", *(f"JSM_NAMESPACE_{name}" for name in ("RANK", "LOCAL_RANK", "SIZE", "LOCAL_SIZE"))),
    _Names("flux run", "FLUX_TASK_RANK", "FLUX_TASK_LOCAL_ID", "FLUX_JOB_SIZE", ""),
)
# what is the same for all tasks of a job, and another for another job
_MPI_JOBS = (
    "PMIX_NAMESPACE",
    "OMPI_MCA_ess_base_jobid",
    "PALS_APID",
    "FLUX_JOB_ID",
    "PMI_JOBID",
    "PBS_JOBID",
    "LSB_JOBID",
)


def join_ranks() -> None:
    """Sets the variables of this process's rank, as `torchrun` does, for a job of any launcher or a process alone.

    Raises:
        UserError: The variables contradict each other, some are missing, or one of them is left over from another job.
    """
    found = rank_variables(os.environ)
    if not os.environ.get("RANK") or os.environ.get("MASTER_PORT") != found["MASTER_PORT"]:
        # left over of a torchrun, whose agent has opened its own port, and nobody opens this job's
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = str(False)
    os.environ.update(found)


def rank_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT of the process whose environment is given.

    Raises:
        UserError: As `join_ranks`.
    """
    given = {name: _number(environment, name) for name in _NAMES if environment.get(name)}
    # where a launcher has set everything, whatever else is there says nothing of this job
    complete = all(environment.get(name) for name in (*_NAMES, "MASTER_ADDR", "MASTER_PORT"))
    tasks = None if complete else started_together(environment)
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
    same = tasks if tasks is not None and (tasks.rank, tasks.world_size) == (rank, world_size) else None
    local_rank = given.get("LOCAL_RANK", same.local_rank if same else 0 if world_size == 1 else None)
    if local_rank is None:
        raise UserError(
            f"RANK is {rank} and WORLD_SIZE {world_size}, but LOCAL_RANK is not set, which chooses the GPU: set it to the "
            "rank's number on its node."
        )
    if not 0 <= local_rank < world_size:
        raise UserError(f"LOCAL_RANK is {local_rank} and WORLD_SIZE {world_size}: it must be below that.")
    address, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")
    if not address:
        address = same.address if same else "127.0.0.1" if world_size == 1 else None
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
        port = str(15_000 + zlib.crc32(same.identity.encode()) % 15_000)
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
    """The task of an srun or mpirun of several tasks that this process is; None where there is no such thing.

    Raises:
        UserError: A variable is no number, or is left over from another job.
    """
    slurm = _slurm_task(environment)
    mpi = _mpi_task(environment, alone=slurm is None)
    # mpirun starts its ranks below one task of srun's on each node, whose variables they have besides; where both say the
    # same, srun has started the ranks with its plugin for MPI, and knows the address too
    inside = mpi is not None and slurm is not None and (mpi.rank, mpi.world_size) != (slurm.rank, slurm.world_size)
    return mpi if slurm is None or inside else slurm


def _slurm_task(environment: Mapping[str, str]) -> _Tasks | None:
    # a script under sbatch is a step of one task, whatever SLURM_NTASKS says
    if _count(environment, "SLURM_STEP_NUM_TASKS") > 1 and "SLURM_PROCID" in environment:
        step = f"{environment.get('SLURM_JOB_ID', '')}.{environment.get('SLURM_STEP_ID', '')}"
        nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST", "")
        rank, local_rank, size = (
            _number(environment, f"SLURM_{name}") for name in ("PROCID", "LOCALID", "STEP_NUM_TASKS")
        )
        return _Tasks("srun", rank, local_rank, size, first_node(nodes), step)
    return None


def _mpi_task(environment: Mapping[str, str], alone: bool) -> _Tasks | None:
    """The task that MPI's variables name; `alone`: nothing else does, so that half of them is an error."""
    for names in _MPI:
        if _count(environment, names.size) > 1 and names.local_rank in environment:
            rank, local_rank, size = (_number(environment, n) for n in (names.rank, names.local_rank, names.size))
            here = _count(environment, names.local_size) == size
            job = next((environment[name] for name in _MPI_JOBS if environment.get(name)), str(os.getppid()))
            return _Tasks(names.starter, rank, local_rank, size, "127.0.0.1" if here else None, job)
    for names in _MPI if alone else ():
        if _count(environment, names.size) > 1 and names.rank in environment:
            raise UserError(
                f"{names.size} is {environment[names.size]} and {names.local_rank} is not set: unset {names.size}, which "
                f"another job has left over, or {_COMMANDS}."
            )
    return None


def shell_of_one_task(environment: Mapping[str, str]) -> str:
    """What to do in a shell of `srun --pty`, which is the first of its tasks while the others wait; empty elsewhere."""
    if not environment.get("SLURM_PTY_PORT") or _slurm_task(environment) is None:
        return ""
    return "; in a shell of srun --pty nobody starts the other tasks: unset SLURM_STEP_NUM_TASKS there"


def first_node(nodes: str) -> str | None:
    """The first name of a list as SLURM writes it: `gpu07` of `gpu[07-12,20],login1`; None of an empty list."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0]) if first else None


def ranks_on_this_node(environment: Mapping[str, str]) -> int:
    """Ranks of this job on this node, as its launcher says; WORLD_SIZE where none does, or what it says is another job's."""
    world_size = int(environment["WORLD_SIZE"])
    said = [environment.get(name, "") for name in ("LOCAL_WORLD_SIZE", *(n.local_size for n in _MPI if n.local_size))]
    for text in (*said, _slurm_tasks_here(environment)):
        here = int(text) if re.fullmatch(r"\d{1,9}", text.strip()) else 0
        if 0 < here <= world_size:
            return here
    return world_size


def _slurm_tasks_here(environment: Mapping[str, str]) -> str:
    """Tasks of a step of srun on this node; empty where there is none. `4(x2),3` is two nodes of 4 and one of 3."""
    node, listed = environment.get("SLURM_NODEID", ""), environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    found = re.findall(r"(\d+)(?:\(x(\d{1,6})\))?", listed)
    counts = [tasks for tasks, nodes in found for _ in range(int(nodes or 1))]
    return counts[int(node)] if re.fullmatch(r"\d{1,6}", node) and int(node) < len(counts) else ""


def cores_of_this_rank(environment: Mapping[str, str]) -> int:
    """Cores that this rank has for itself: those that it may use, or its share where all ranks of the node may use them."""
    cores = len(os.sched_getaffinity(0))
    # srun gives each task cores of its own, where it is asked for their number
    if environment.get("SLURM_CPUS_PER_TASK", "") == str(cores) and _slurm_tasks_here(environment):
        return cores
    return max(1, cores // ranks_on_this_node(environment))


def _count(environment: Mapping[str, str], name: str) -> int:
    """The variable's number, 0 where there is none."""
    return _number(environment, name) if environment.get(name) else 0


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    if not re.fullmatch(r"\d{1,9}", value.strip()):
        raise UserError(f"the environment variable {name} is {value!r}: it must be a whole number.")
    return int(value)
