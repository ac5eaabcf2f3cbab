"""Runs cases of `cuda_cases` in a process that takes this machine for one with GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from launching import LIMIT, ROOT, WORKERS, environment

# scripts of the benchmarks, of which this is a tool
sys.path.append(str(ROOT / "benchmarks"))
import fake_cuda


def skip_reason() -> str | None:
    """Why no process can pretend here, or None."""
    return fake_cuda.available()


def pretending(folder: Path, devices: int = 2) -> dict[str, str]:
    """The environment of a process that may call `fake_cuda.pretend`, and sees the helpers of the tests."""
    env = environment() | fake_cuda.environment(folder, devices)
    return env | {"PYTHONPATH": os.pathsep.join([env["PYTHONPATH"], str(ROOT / "tests" / "helpers")])}


def run_cases(names: list[str], folder: Path) -> dict[str, dict[str, Any]]:
    """Case -> what the worker found of it, or its error."""
    command = [sys.executable, str(WORKERS / "fake_cuda_step.py"), *names]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=pretending(folder),
        capture_output=True,
        text=True,
        timeout=LIMIT,
        stdin=subprocess.DEVNULL,
    )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"case"')]
    assert done.returncode == 0 and len(found) == len(names), done.stderr[-3000:]
    return {case.pop("case"): case for case in found}
