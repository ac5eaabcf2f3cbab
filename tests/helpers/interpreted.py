"""Runs a file of numeric cases under Triton's interpreter, in one process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


def run_cases(file: str, *arguments: str) -> dict[str, dict[str, float]]:
    """Errors of every case of `file`, by name. TRITON_INTERPRET is read when a kernel is decorated: hence the process."""
    done = subprocess.run(
        [sys.executable, file, *arguments], capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"}
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def print_cases(cases: dict[str, dict], run: Callable[..., dict[str, float]]) -> None:
    """What such a file does when it is run."""
    from scalekd_ds.kernels.interpreted import INTERPRETED

    assert INTERPRETED.value, f"{Path(sys.argv[0]).name} wants TRITON_INTERPRET=1"
    print(json.dumps({name: run(**case) for name, case in cases.items()}))
