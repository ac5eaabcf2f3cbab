"""Runs a job as a child: signals go to its ranks, which save and end, and no process of it is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from scalekd_ds.cluster.launcher import RUNNERS, STARTED_BY, identity
from scalekd_ds.process import signals

# seconds for which processes that a dead launcher has left behind may save
_LEFT_BEHIND_S = 600.0
# seconds in which the job's processes end at a second Ctrl-C
_AT_ONCE_S = 10.0


class Job:
    """A running command, which is DeepSpeed's launcher or trains itself.

    It runs in a session of its own. A terminal sends Ctrl-C to all processes of its session: DeepSpeed's launcher would then
    leave its ranks half a minute to end, and would end itself before them.

    Args:
        command: Its words.
        **more: Further arguments of `subprocess.Popen`.

    Attributes:
        signal: The first signal that was passed on, or None.
    """

    def __init__(self, command: Sequence[str | Path], **more: Any) -> None:
        self.signal: int | None = None
        self._presses = 0
        environment = {**(more.pop("env", None) or os.environ), STARTED_BY: identity()}
        self._process = subprocess.Popen(command, env=environment, start_new_session=True, **more)

    def wait(self) -> int:
        """Waits until all processes of the job have ended.

        Returns:
            The exit status of its first, negative where a signal ended it.
        """
        status = self._process.wait()
        deadline = time.monotonic() + _LEFT_BEHIND_S
        told = False
        while (left := self._members()) and time.monotonic() < deadline:
            if not told:
                # the launcher died before its ranks
                told = True
                self._send(left, signal.SIGTERM)
            time.sleep(0.2)
        return status

    def pass_on(self, number: int, _: str) -> None:
        """Sends a signal to the ranks, or to the launcher where it has not started any here."""
        self.signal = self.signal or number
        self._presses += number == signal.SIGINT
        if self._presses == 2:
            # a rank that is stopped, or in a library that keeps Python's lock, never hears of it
            killing = threading.Timer(_AT_ONCE_S, lambda: self._send(self._members(), signal.SIGKILL))
            killing.daemon = True
            killing.start()
        members = self._members()
        ranks = [process for process in members if _is_rank(process)]
        if ranks:
            self._send(ranks, number)
        elif any(runner in _words(process) for process in members for runner in RUNNERS):
            # with a handler for SIGTERM where it has ranks on other nodes, and without a traceback where it has none
            all_launchers = ("deepspeed.launcher.", *RUNNERS)
            self._send([p for p in members if any(name in _words(p) for name in all_launchers)], signal.SIGTERM)
        else:
            self._send([p for p in members if p.pid == self._process.pid], number)

    def _members(self) -> list[psutil.Process]:
        """The processes of the job's session that run on this machine."""
        found = []
        for pid in psutil.pids():
            with suppress(OSError, psutil.Error):
                if os.getsid(pid) == self._process.pid and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                    found.append(psutil.Process(pid))
        return found

    @staticmethod
    def _send(processes: list[psutil.Process], number: int) -> None:
        for process in processes:
            with suppress(psutil.Error):
                process.send_signal(number)


def run_job(command: Sequence[str | Path], **more: Any) -> tuple[int, int | None]:
    """Runs a job to its end; signals to this process go to its ranks meanwhile.

    Returns:
        Its exit status, negative where a signal ended it before it could say so, and the first signal that was passed on to
        it, or None.
    """
    job: list[Job] = []
    early: list[int] = []

    def pass_on(number: int, name: str) -> None:
        if job:
            job[0].pass_on(number, name)
        else:
            early.append(number)

    with signals.passed_to(pass_on, forwards=True):
        job.append(Job(command, **more))
        for number in early:
            job[0].pass_on(number, "")
        return job[0].wait(), job[0].signal


def _words(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()[:5])
    except psutil.Error:
        return ""


def _is_rank(process: psutil.Process) -> bool:
    """Whether a launcher has started it: it has a RANK, which its parent has not."""
    return _has_rank(process) and not _has_rank(process.parent())


def _has_rank(process: psutil.Process | None) -> bool:
    try:
        return process is not None and "RANK" in process.environ()
    except psutil.Error:
        return False
