"""Runs commands within a time, and ends them with everything that they started."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Sequence
from typing import Any

import harness
import psutil


def kill_tree(process: subprocess.Popen, number: int = signal.SIGKILL) -> None:
    """Sends a signal to a process and all that it started, whatever sessions they have made."""
    with contextlib.suppress(psutil.NoSuchProcess):
        found = psutil.Process(process.pid)
        for each in [found, *found.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.send_signal(number)


def start(command: Sequence[Any], env: dict[str, str] | None = None, **streams: Any) -> subprocess.Popen:
    """A command in the background, from the repository's root, with nothing to read."""
    print("$", *command, flush=True)
    return subprocess.Popen([*map(str, command)], cwd=harness.ROOT, env=env, stdin=subprocess.DEVNULL, **streams)


def status_of(process: subprocess.Popen, seconds: float, last: int | None = None) -> int | str:
    """Exit status, or `past its time` after `seconds`; the process is then ended.

    Args:
        process: From `start`.
        seconds: Time from now.
        last: A signal that comes first, after which the process has 8 s to write what it knows.
    """
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(max(1.0, seconds))
    if last is not None:
        process.send_signal(last)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(8.0)
    kill_tree(process)
    process.wait()
    return "past its time"


def run(command: Sequence[Any], seconds: float, env: dict[str, str] | None = None) -> float:
    """Runs a command to its end, and returns its seconds.

    Raises:
        RuntimeError: It failed, or was not done after `seconds`.
    """
    begin = time.monotonic()
    status = status_of(start(command, env), seconds)
    if status:
        raise RuntimeError(f"`{' '.join(map(str, command))[:200]}` ended with {status}")
    return time.monotonic() - begin
