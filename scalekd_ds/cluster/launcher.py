"""Checks the hosts file of the deepspeed launcher that started this process."""

from __future__ import annotations

import os

import psutil

from scalekd_ds.cluster.hosts import read_hosts
from scalekd_ds.errors import UserError

# what the launcher's command line contains when it is started as a command, a script or a module
_LAUNCHERS = ("deepspeed", "ds", "runner.py", "deepspeed.launcher.runner")


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
