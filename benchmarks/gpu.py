#!/usr/bin/env python3
"""Runs everything that needs a GPU within eight minutes: `python benchmarks/gpu.py`.

These are the kernels' benchmark, the whole step of Swin-L -> ResNet-50 at batch 128, the kernels' tests, and the charts.
Results go to $OUT, else to benchmarks/results, and a short summary is printed last. A part that fails does not stop the
others, but makes the exit status 1. A part for which no time is left is not started, which counts as a failure.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import harness
import torch

HERE = Path(__file__).resolve().parent


def parts(quick: bool) -> list[tuple[str, list[str], float]]:
    """(name, command, time limit in seconds) of each part, in order.

    Args:
        quick: Take small sizes, which show that everything runs but not how fast.
    """
    python = sys.executable
    step = [python, str(HERE / "step.py"), "--pair", "swin_large-resnet50", "--batch", "8" if quick else "128"]
    rounds = ["--repeats", "2", "--warmup", "1"] if quick else ["--repeats", "15", "--warmup", "3"]
    shapes = ["--shapes", "swin_l", "beit_l", "swin_l.s3", "swin_l.s4", "--repeats", "5"] if quick else []
    return [
        # first, because it writes the attention's table, which the step uses
        ("kernels", [python, str(HERE / "kernels.py"), "--write-table", *shapes], 210),
        ("step", [*step, *rounds], 150),
        ("tests", [python, "-m", "pytest", "-q", "-m", "gpu", "tests/kernels"], 110),
        ("charts", [python, str(HERE / "plot.py")], 20),
    ]


def summarise(out: Path) -> None:
    """Prints the most important figures, from the JSON files in `out`."""
    rows = []
    step, kernels = out / "step-swin_large-resnet50-cuda.json", out / "kernels-cuda.json"
    if step.is_file():
        result = json.loads(step.read_text())
        expected = result["predictions"] or {}
        ours, theirs = (result["variants"].get(f"{whose}-bf16") for whose in ("ours", "published"))
        for name, ratio in result["ratios"].items():
            rows.append([f"step {name}, times faster", ratio["median"], expected.get(name)])
        rows.append(["step ours-bf16, images/s", ours["images_per_s"], None])
        rows.append(["step ours-bf16, MFU", ours["mfu"], expected.get("mfu")])
        memory = "peak memory, ours/published"
        rows.append([f"step {memory}", ours["peak_memory_bytes"] / theirs["peak_memory_bytes"], expected.get(memory)])
    if kernels.is_file():
        for row in json.loads(kernels.read_text())["rows"]:
            if row["direction"] != "forward+backward":
                continue
            name = f"{row['operation']} {row['shape']}"
            ours, expected = row["variants"]["library"], row["predicted_ms"] or {}
            rows.append([f"{name}, ms", ours["median"], expected.get("library")])
            rows.append([f"{name}, share of floor", ours["share_of_floor"], None])
            for other in ("published", "compile", "sdpa"):
                if other in row["variants"]:
                    faster = row["variants"][other]["library_times_faster"]["median"]
                    rows.append([f"{name}, times faster than {other}", faster, None])
            if "triton" in row["variants"]:
                # the library may not have called Triton, if its attention table did not have this shape before
                faster = row["variants"]["sdpa"]["median"] / row["variants"]["triton"]["median"]
                rows.append([f"{name}, triton ms", row["variants"]["triton"]["median"], expected.get("triton")])
                rows.append([f"{name}, triton times faster than sdpa", faster, None])
    if rows:
        harness.print_table(["", "measured", "expected"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="all parts end within this time")
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, which show that everything runs but not how fast"
    )
    parser.add_argument("--out", help="folder of the results; else $OUT, else benchmarks/results")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: no CUDA device here; benchmarks/step.py and benchmarks/kernels.py also run on a CPU.")
    out = harness.results_dir(args.out)
    # the package need not be installed: this checkout is enough
    path = os.pathsep.join([str(harness.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OUT": str(out), "PYTHONPATH": path}
    deadline, failed = time.monotonic() + 60 * args.minutes, []
    for name, command, limit in parts(args.quick):
        left = deadline - time.monotonic()
        if left < 10:
            print(f"-- {name}: not started, {left:.0f} s left")
            failed.append(name)
            continue
        print(f"-- {name}", flush=True)
        begin = time.monotonic()
        try:
            code = subprocess.run(command, cwd=harness.ROOT, env=environment, timeout=min(limit, left)).returncode
        except subprocess.TimeoutExpired:
            code = "past its time"
        print(f"-- {name}: {code if code else 'done'}, {time.monotonic() - begin:.0f} s", flush=True)
        if code:
            failed.append(name)
    summarise(out)
    if failed:
        sys.exit(f"error: {', '.join(failed)} did not finish.")


if __name__ == "__main__":
    main()
