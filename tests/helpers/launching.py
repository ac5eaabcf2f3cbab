"""Starts jobs as a user does, through the deepspeed launcher, and waits for them."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
WORKERS = ROOT / "tests" / "workers"


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
    """This process's environment with the tests' interpreter first on PATH and one thread a rank."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **extra}


def launch(script: str | Path, *arguments, ranks: int = 2, timeout: float = 300, launcher=(), env=None):
    """Runs `deepspeed --num_accelerators RANKS script ...` from the repository's root."""
    command = ["deepspeed", "--num_accelerators", str(ranks), "--master_port", str(free_port()), *launcher]
    return subprocess.run(
        [*command, str(script), *map(str, arguments)],
        cwd=ROOT,
        env=env or environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
    )


def alone(script: str | Path, *arguments, timeout: float = 300, env=None):
    """Runs a launch script in one process, without the launcher."""
    return subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        cwd=ROOT,
        env=env or environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
    )
