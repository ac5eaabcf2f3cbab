"""The kernels on all shapes, by `kernels.py`, which also fills the library's table for the step, and their charts."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_cuda
import harness

from gpu_parts import commands

BENCHMARKS = harness.ROOT / "benchmarks"
# a shape of each kernel, and one with a head size that PyTorch would give to cuDNN
_SMALL = [
    "--shapes",
    "swin_s",
    "swin_s.s4",
    "swin_l-deit.s4",
    "swin_l.w7.4",
    "lamb.small",
    "--batch",
    2,
    "--repeats",
    2,
    "--ceiling-repeats",
    1,
]


def run(folder: Path, seconds: float, dry: bool, save: Callable[[dict], None]) -> dict[str, Any]:
    """Raises RuntimeError if kernels.py failed or measured nothing."""
    command, env = [sys.executable, BENCHMARKS / "kernels.py", "--out", folder], None
    if not dry:
        command.append("--write-table")
    elif (why := fake_cuda.available()) is None:
        # the lines that a GPU runs, on tensors without values
        env = fake_cuda.environment(folder.parent / "stand-ins")
        command = [sys.executable, BENCHMARKS / "fake_cuda" / "run_script.py", *command[1:], *_SMALL, "--compile"]
    else:
        print(f"on the CPU: {why}", flush=True)
        command += [*_SMALL, "--device", "cpu"]
    status = commands.status_of(commands.start(command, env), seconds - 15.0)
    files = sorted(folder.glob("kernels-*.json"))
    if not files:
        raise RuntimeError(f"kernels.py ended with {status} before it had measured a shape")
    result = json.loads(files[0].read_text())
    found = {"status_of_kernels": status, **result}
    picks = folder / "attention-table.json"
    found["attention_table"] = json.loads(picks.read_text()) if picks.is_file() else {}
    picks = folder / "windows-table.json"
    found["windows_table"] = json.loads(picks.read_text()) if picks.is_file() else {}
    picks = folder / "lamb-table.json"
    found["lamb_table"] = json.loads(picks.read_text()) if picks.is_file() else {}
    found["left_out"] = [
        f"{row['operation']} {row['shape']} {row['direction']} {name}: {variant['error']}"
        for row in result["rows"]
        for name, variant in row["variants"].items()
        if "error" in variant
    ]
    save(found)
    if importlib.util.find_spec("matplotlib") and not dry:
        commands.run([sys.executable, BENCHMARKS / "plot.py", files[0]], 60.0)
    if status:
        raise RuntimeError(f"kernels.py ended with {status} after {len(result['rows'])} rows")
    return found
