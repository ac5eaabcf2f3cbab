#!/usr/bin/env python3
"""Does a student learn as much from a cache in eight bits as from the teacher itself? Several seeds of Fashion-MNIST.

Each seed trains `fashion-scalekd`, with crops and flips, once from the cache and once with the teacher on the same views: the
two share initialisation, images, views and order, so the difference is taken for each seed. Finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ablation
import harness

from scalekd_ds.cluster.job import run_job
from scalekd_ds.errors import UserError, run_cli
from scalekd_ds.process import signals
from scalekd_ds.training.finished_run import fashion_runner, log_of, place_fashion

LIVE = "teacher on the same views"
AUGMENTED = ("--data.random_crop", "true", "--data.crop_scale", "[0.5,1.0]", "--data.hflip", "0.5")


def make_cache(args: argparse.Namespace, teacher: Path, more: list[str]) -> Path:
    """Makes the cache, or what is missing of it, and returns its folder.

    Args:
        args: The command line arguments.
        teacher: Weights of the teacher.
        more: Arguments that the cache shares with the runs that read it.

    Raises:
        UserError: It was not made; the message names the log.
    """
    folder, log = args.out / f"cache-{args.store}", log_of(args.out, f"cache-{args.store}")
    command = [
        sys.executable,
        "-P",
        "-m",
        "scalekd_ds",
        "cache",
        "--recipe",
        "fashion-scalekd",
        "--teacher",
        str(teacher),
    ]
    command += [*more, "--seed", "0", "--views", str(args.views), "--store", args.store, "--out", str(folder)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as out:
        status, number = run_job(
            [*command, "--run.progress", "plain"], env=dict(os.environ), stdout=out, stderr=subprocess.STDOUT
        )
    if number is not None:
        raise signals.Interrupted(number)
    if status:
        raise UserError(f"the cache was not made (status {status}); the log is {log}.")
    return folder


def run_seeds(args: argparse.Namespace) -> dict[str, list[float]]:
    """Trains two students for each seed: row -> top-1 of each seed in percent.

    Args:
        args: The command line arguments.

    Raises:
        UserError: A run failed.
    """
    place_fashion(args.data)
    run = fashion_runner(args.data, args.out)
    cores = len(os.sched_getaffinity(0))
    weights = args.teacher
    if weights is None:
        print(f"teacher: top-1 {run('fashion-teacher', 'teacher', cores)['top1']:.2f}", flush=True)
        weights = args.out / "teacher" / "student.safetensors"
    shared = ["--data.root", str(args.data), *AUGMENTED, "--data.train_images", str(args.images)]
    shared += ["--data.subset_seed", "0", "--schedule.epochs", f"{args.epochs:g}"]
    shared += ["--schedule.warmup_epochs", f"{0.15 * args.epochs:g}"]
    cache = make_cache(args, weights, shared)
    rows = {
        LIVE: ("--data.views", str(args.views), "--data.view_seed", "0"),
        f"{args.store} cache": ("--teacher_cache", str(cache)),
    }

    def cell(row: str, seed: int) -> float:
        name = f"{row.replace(' ', '-')}-seed{seed}"
        result = run("fashion-scalekd", name, 1, "--teacher", str(weights), *shared, "--seed", str(seed), *rows[row])
        print(f"{row:<25} seed {seed}  top-1 {result['top1']:.2f}  {result['cpu_seconds']:.0f} CPU s", flush=True)
        return result["top1"]

    with ThreadPoolExecutor(args.jobs or cores) as pool:
        jobs = {(row, seed): pool.submit(cell, row, seed) for seed in range(args.seeds) for row in rows}
        return {row: [jobs[row, seed].result() for seed in range(args.seeds)] for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--views", type=int, default=10, help="views of each image in the cache")
    parser.add_argument("--store", default="int8", help="how tokens are kept: int8, bf16 or fp32")
    parser.add_argument("--epochs", type=float, default=30.0)
    parser.add_argument("--images", type=int, default=1000, help="images of the training set")
    parser.add_argument("--teacher", type=Path, help="weights of a trained fashion-teacher; else one is trained")
    parser.add_argument(
        "--jobs", type=int, default=0, help="runs at a time, with one thread each; 0 takes one per core"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/cached-seeds"), help="where the runs go")
    parser.add_argument("--data", type=Path, default=Path("runs/fashion-mnist"))
    parser.add_argument("--results", help="folder of the JSON and the table; else $OUT, else benchmarks/results")
    args = parser.parse_args()
    if args.seeds < 1 or args.epochs <= 0:
        raise UserError(f"--seeds is {args.seeds} and --epochs {args.epochs:g}: both must be positive.")
    rows = ablation.summary(run_seeds(args), against=LIVE)
    folder = harness.results_dir(args.results)
    settings = {name: getattr(args, name) for name in ("store", "views", "images", "epochs", "seeds")}
    harness.write_json(
        folder / f"cached-seeds-{args.store}.json", {"benchmark": "cached seeds", **settings, "rows": rows}
    )
    table = ablation.table(rows, "to the teacher")
    (folder / f"cached-seeds-{args.store}.md").write_text(table)
    print(table, end="")


if __name__ == "__main__":
    run_cli(main)
