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


def lines_of(worker: str, folder: Path, *arguments: str) -> tuple[list[str], str]:
    """The lines that a script of tests/workers prints in a process that pretends, and what it wrote as errors."""
    done = subprocess.run(
        [sys.executable, str(WORKERS / worker), *arguments],
        cwd=ROOT,
        env=pretending(folder),
        capture_output=True,
        text=True,
        timeout=LIMIT,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines(), done.stderr


def run_cases(names: list[str], folder: Path) -> dict[str, dict[str, Any]]:
    """Case -> what the worker found of it, or its error."""
    lines, errors = lines_of("fake_cuda_step.py", folder, *names)
    found = [json.loads(line) for line in lines if line.startswith('{"case"')]
    assert len(found) == len(names), errors[-3000:]
    return {case.pop("case"): case for case in found}
