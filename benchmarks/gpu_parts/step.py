"""The whole step of three pairs, by `step.py`, with memory: all in 16 bits first, and then in float32 while time is left."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness

from gpu_parts import commands

PAIRS = ("swin_large-resnet50", "beit_large-vit_base", "dinov2_large-convnext_tiny")
# of models of this size: two to build, both ceilings, and some rounds
_SECONDS_A_CALL = 25.0


def run(folder: Path, seconds: float, dry: bool, save: Callable[[dict], None]) -> dict[str, Any]:
    """Raises RuntimeError if no pair, or not all of them, could be measured."""
    end, found = time.monotonic() + seconds - 15.0, {"pairs": {}, "not_finished": []}
    for precision in ("fp32",) if dry else ("bf16", "fp32"):
        for pair in ("tiny",) if dry else PAIRS:
            left, label = end - time.monotonic(), f"{pair} in {precision}"
            if left < (0.0 if dry else _SECONDS_A_CALL):
                found["not_finished"].append(f"{label}: {left:.0f} s left")
                continue
            status = commands.status_of(commands.start(command_of(pair, precision, folder, dry)), left)
            file = next((folder / precision).glob(f"step-{pair}-*.json"), None)
            if file is not None:
                found["pairs"].setdefault(pair, {})[precision] = json.loads(file.read_text())
            if status:
                found["not_finished"].append(f"{label}: ended with {status}")
            save(found)
    if found["not_finished"]:
        raise RuntimeError("; ".join(found["not_finished"]))
    return found


def command_of(pair: str, precision: str, folder: Path, dry: bool) -> list[Any]:
    """step.py on one pair, both structures in one precision."""
    variants = [f"ours-{precision}", f"published-{precision}"]
    command = [sys.executable, harness.ROOT / "benchmarks" / "step.py", "--pair", pair, "--no-apart"]
    command += ["--variants", *variants, "--out", folder / precision]
    if dry:
        return [*command, "--device", "cpu", "--batch", 1, "--repeats", 1, "--ceiling-repeats", 1]
    return [*command, "--batch", 128, "--repeats", 10 if precision == "bf16" else 4, "--warmup", 3]
