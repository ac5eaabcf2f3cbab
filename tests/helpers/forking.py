"""Starts scripts in forks of a process that has torch, DeepSpeed and timm loaded.

A job of two ranks from the launcher spends some twenty seconds of processor time on four imports of torch and DeepSpeed
before it does anything. That is worth seeing where the launcher or the start is what is tested; here it is not.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import multiprocessing.connection
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import pytest
from launching import LIMIT, ROOT, environment, free_port

_FORKS = multiprocessing.get_context("forkserver")
# what a run imports of others; none of our own modules, which each fork imports itself
_FORKS.set_forkserver_preload(
    [
        "deepspeed",
        "deepspeed.ops.op_builder.all_ops",
        "deepspeed.runtime.zero.muon.muon_optimizer",
        "deepspeed.runtime.zero.stage3",
        "nvidia.dali.pipeline",
        "tensorboard.summary.writer.event_file_writer",
        "timm",
        "torch.utils.tensorboard",
    ]
)


def forked_ranks(script: str | Path, *arguments: Any, ranks: int = 2, port: int | None = None, timeout: float = LIMIT):
    """Runs a script on `ranks` ranks, whose variables are those that the launcher sets, and waits for it.

    As under the launcher, one rank that fails ends the others.
    """
    return _run(script, arguments, _ranks(ranks, port), timeout)


@contextmanager
def forked_in_background(script: str | Path, *arguments: Any, log: Path, ranks: int = 0) -> Iterator[list[BaseProcess]]:
    """The running processes of a script, which write into the file `log`: ranks in their order, or one that is none.

    Nobody ends the others where one fails. Leaving the block kills all and prints the file.
    """
    log.touch()
    processes = _started(script, arguments, _ranks(ranks, None) if ranks else [{}], log, log)
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()
        print(log.read_text())


def ended(processes: list[BaseProcess], timeout: float = LIMIT) -> list[int]:
    """The exit statuses of processes of `forked_in_background`, for which it waits."""
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    assert None not in codes, f"no end after {timeout} s: {codes}"
    return codes


def forked(script: str | Path, *arguments: Any, timeout: float = LIMIT) -> subprocess.CompletedProcess[str]:
    """Runs a script in one process and waits for it."""
    return _run(script, arguments, [{}], timeout)


def forked_with(
    variables: list[dict[str, str]], script: str | Path, *arguments: Any, timeout: float = LIMIT
) -> subprocess.CompletedProcess[str]:
    """Runs a script in as many processes as there are sets of environment variables to add, and waits for them."""
    return _run(script, arguments, variables, timeout)


def _ranks(count: int, port: int | None) -> list[dict[str, str]]:
    """The variables that the launcher sets for each of the ranks of one node."""
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port or free_port()), "WORLD_SIZE": str(count)}
    job |= {"LOCAL_SIZE": str(count), "CROSS_RANK": "0", "CROSS_SIZE": "1"}
    return [job | {"RANK": str(n), "LOCAL_RANK": str(n)} for n in range(count)]


def _command(script: str | Path, arguments: tuple) -> list[str]:
    return [str(ROOT / script), *map(str, arguments)]


def _started(script: str | Path, arguments: tuple, variables: list[dict[str, str]], out: Path, err: Path):
    """The processes, begun, as many as there are sets of variables."""
    with pytest.MonkeyPatch.context() as patch:
        env = environment()
        # the server that forks starts with the first of these, and torch reads its variables when it is imported
        for name, value in env.items():
            patch.setenv(name, value)
        forkserver.ensure_running()
        given = _command(script, arguments), str(out), str(err)
        processes = [_FORKS.Process(target=_begin, args=(*given, env | own)) for own in variables]
        for process in processes:
            process.start()
        return processes


def _run(script: str | Path, arguments: tuple, variables: list[dict[str, str]], timeout: float):
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "stdout"), Path(folder, "stderr")
        out.touch()
        err.touch()
        code = _wait(_started(script, arguments, variables, out, err), time.monotonic() + timeout)
        text, errors, command = out.read_text(), err.read_text(), _command(script, arguments)
        if code is None:
            raise subprocess.TimeoutExpired(command, timeout, text, errors)
        return subprocess.CompletedProcess(command, code, text, errors)


def _wait(processes: list, deadline: float) -> int | None:
    """The exit status of the first process that fails, 0 where none does, None where time is up; all have ended."""
    try:
        while time.monotonic() < deadline:
            codes = [process.exitcode for process in processes]
            failed = [code for code in codes if code]
            if failed:
                # the others say why they end, for which they look for a lost rank first; a stopped one says nothing
                for process in processes:
                    if process.exitcode is None and psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
                        process.join(60)
                return failed[0]
            if None not in codes:
                return 0
            multiprocessing.connection.wait([p.sentinel for p in processes if p.exitcode is None], 1.0)
        return None
    finally:
        for process in processes:
            process.kill()
            process.join()


def _begin(command: list[str], out: str, err: str, env: dict[str, str]) -> None:
    """The script as the main program of this fork."""
    # ZeRO-3 collects garbage for every group of parameters, and what was imported is no garbage
    gc.freeze()
    os.environ.clear()
    os.environ.update(env)
    os.chdir(ROOT)
    append = os.O_WRONLY | os.O_APPEND
    for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), os.open(out, append), os.open(err, append))):
        os.dup2(file, number)
    # what pytest added, and no interpreter that is started here would have
    added = {Path(__file__).parent, ROOT} - set(map(Path, env.get("PYTHONPATH", "").split(os.pathsep)))
    sys.path[:] = [str(Path(command[0]).parent), *(p for p in sys.path if p and Path(p) not in added)]
    sys.argv = command
    try:
        runpy.run_path(command[0], run_name="__main__")
    finally:
        # multiprocessing leaves them out
        atexit._run_exitfuncs()
