"""Starts jobs as a user does, through the deepspeed launcher or without it, and reads what they say."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
WORKERS = ROOT / "tests" / "workers"
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# seconds after which a process hangs; a machine under load is slower, not wrong
LIMIT = 1800


def free_port() -> int:
    """A TCP port that nobody listens on, below the range from which outgoing connections take theirs."""
    while True:
        port = random.SystemRandom().randrange(15_000, 30_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def environment(**extra: str) -> dict[str, str]:
    """This process's environment with the tests' interpreter first on PATH, one thread a rank, and no rank of a job."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # a run in this very process has left its own
    inherited = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    return {**inherited, "PATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **extra}


def make(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Runs `make` as a user does: an outer make, as that of `make test`, would have it print its folder and its level."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "TORCH")}
    command = ["make", "--no-print-directory", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=inherited, capture_output=True, text=True, timeout=LIMIT)


def make_errors(*arguments: object, cwd: Path = ROOT) -> list[str]:
    """What a `make` that fails prints as errors, without make's own last line."""
    done = make(*arguments, cwd=cwd)
    assert done.returncode == 2, done.stdout + done.stderr
    return [line for line in done.stderr.splitlines() if not line.startswith("make: ***")]


def launcher_command(ranks: int = 2) -> list[str]:
    """`deepspeed` with the options that start `ranks` processes here, on a port of their own."""
    return ["deepspeed", "--num_accelerators", str(ranks), "--master_port", str(free_port())]


def run(command: list, timeout: float, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs `command` from the repository's root, with its output captured and nothing to read."""
    return subprocess.run(
        [*map(str, command)],
        cwd=ROOT,
        env=env or environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
    )


def launch(script: str | Path, *arguments, ranks: int = 2, timeout: float = LIMIT, launcher=(), env=None):
    """Runs a script through the launcher, with its further options `launcher`, and waits for it."""
    return run([*launcher_command(ranks), *launcher, script, *arguments], timeout, env)


def alone(script: str | Path, *arguments, timeout: float = LIMIT, env=None):
    """Runs a launch script in one process, without the launcher, and waits for it."""
    return run([sys.executable, script, *arguments], timeout, env)


@contextmanager
def in_background(command: list, log: Path, env: dict[str, str] | None = None) -> Iterator[subprocess.Popen]:
    """A running command that writes into the file `log`; leaving the block kills it and prints the file.

    A file, not a pipe: a rank that outlives its launcher would hold a pipe open.
    """
    with log.open("w") as output:
        process = subprocess.Popen(
            [*map(str, command)],
            cwd=ROOT,
            env=env or environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            print(log.read_text())


def wait_until(found: Callable[[], object], process: subprocess.Popen, log: Path, seconds: float = LIMIT) -> None:
    """Returns once `found()` is true; fails with the log if `process` ends before that or time is up."""
    deadline = time.monotonic() + seconds
    while not found():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.05)


def result_of(done: subprocess.CompletedProcess[str]) -> Any:
    """What a script of tests/workers told by `ranks.tell`."""
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    told = next(line for line in done.stdout.splitlines() if "RESULT " in line).split("RESULT ", 1)[1]
    # another rank may have printed into the rest of the line
    return json.JSONDecoder().raw_decode(told)[0]


def errors_of(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Our own error lines, without the launcher's."""
    return [line for line in done.stderr.splitlines() if line.startswith("error")]
