"""The launcher that started this process: its hosts file, and whether it is still there."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial

import psutil

from scalekd_ds.cluster.hosts import read_hosts
from scalekd_ds.errors import UserError

# modules that are the launcher: DeepSpeed's, and what `scalekd train` starts in its place
RUNNERS = ("deepspeed.launcher.runner", "scalekd_ds.commands.launcher")
# what the launcher's command line contains when it is started as a command, a script or a module
_LAUNCHERS = ("deepspeed", "ds", "runner.py", *RUNNERS)


# those of all launchers, on the node of the command and on the others
_ANY_LAUNCHER = (
    *_LAUNCHERS,
    "deepspeed.launcher.launch",
    "torchrun",
    "torch.distributed.run",
    "torch.distributed.launch",
)
# set by `run_job`: the process that has to outlive the job, and takes its signals, as `identity` writes it
STARTED_BY = "SCALEKD_STARTED_BY"


def identity() -> str:
    """This process's number and the time of its start, by which a later process of that number is told from it."""
    process = psutil.Process()
    return f"{process.pid} {process.create_time()}"


def abandonment() -> Callable[[], str | None]:
    """A function that says why this process should end, once one of those that started it has; None until then.

    A launcher that is killed leaves its ranks behind: they would train on with nobody to tell, and to stop them.
    """
    started: dict[str, Callable[[], bool]] = {}
    if by := os.environ.get(STARTED_BY):
        started["the command that started it"] = lambda: _still_runs(by)
    if "RANK" in os.environ:
        own = psutil.Process()
        above = own.parents()
        for process in above:
            if _is_launcher(process):
                started[f"its launcher, process {process.pid},"] = partial(_runs, process)
        # those of DeepSpeed: the one on each node starts the ranks, and another one has started that
        nodes = [p for p in above if "deepspeed.launcher.launch" in _command(p)]
        first = nodes[-1] if nodes else own
        if any(word.startswith("--local_rank=") for word in sys.argv) and _orphaned(first):
            started["its launcher"] = lambda: False

    def reason() -> str | None:
        return next((f"{name} has ended" for name, runs in started.items() if not runs()), None)

    return reason


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _is_launcher(process: psutil.Process) -> bool:
    return any(os.path.basename(part) in _ANY_LAUNCHER for part in _command(process)[:4])


def _orphaned(process: psutil.Process) -> bool:
    """Whether the parent has ended before this process could see it, and init or its like has taken its place."""
    parent = process.parent()
    return parent is not None and not _is_launcher(parent) and (parent.pid == 1 or parent.name() == "systemd")


def _still_runs(identity: str) -> bool:
    number, started = identity.split()
    try:
        process = psutil.Process(int(number))
        return _runs(process) and abs(process.create_time() - float(started)) < 1.0
    except psutil.Error:
        return False


def _runs(process: psutil.Process) -> bool:
    try:
        # a process of that number that was started at another time is another one
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def check_hostfile() -> None:
    """Refuses a hosts file of the launcher that does not exist, or that `read_hosts` refuses.

    If the file is missing, DeepSpeed's launcher only warns and then trains on this node alone, so a typing error turns a
    32-GPU job into an 8-GPU one. The file's name is passed to no rank: it is read from the command line of the launcher,
    which is a parent of this process. Nothing is checked if no parent is a launcher.

    Raises:
        UserError: The file does not exist, or is not a valid hosts file.
    """
    for process in psutil.Process().parents():
        try:
            command, folder = process.cmdline(), process.cwd()
        except psutil.Error:
            continue
        if not any(os.path.basename(part) in _LAUNCHERS for part in command[:3]):
            continue
        for position, part in enumerate(command):
            flag, _, value = part.partition("=")
            if flag in ("--hostfile", "-H"):
                value = value or (command[position + 1] if position + 1 < len(command) else "")
                path = os.path.join(folder, value)
                if not os.path.isfile(path):
                    raise UserError(
                        f"hosts file {value!r} does not exist: DeepSpeed would train on this node alone. Give the right "
                        "path to --hostfile, or leave it out for one machine."
                    )
                read_hosts(path)
            # arguments after the script's name are the script's own
            if part.endswith(".py") and os.path.basename(part) != "runner.py":
                break
