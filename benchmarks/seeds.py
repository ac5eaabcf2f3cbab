"""Several runs of Fashion-MNIST over several seeds, as a table of top-1 and of differences that are taken for each seed."""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from scalekd_ds.errors import UserError
from scalekd_ds.training.finished_run import fashion_runner, place_fashion

Runner = Callable[..., dict[str, Any]]


def parser_of(description: str, seeds: int, out: str) -> argparse.ArgumentParser:
    """A parser of the arguments that such benchmarks share.

    Args:
        description: What the benchmark is for.
        seeds: Default number of seeds.
        out: Default folder of the runs.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--epochs", type=float, default=30.0)
    parser.add_argument("--jobs", type=int, default=0, help="runs at a time, of one thread each; 0 takes one per core")
    parser.add_argument("--out", type=Path, default=Path(out), help="where the runs go")
    parser.add_argument("--data", type=Path, default=Path("runs/fashion-mnist"))
    parser.add_argument("--results", help="folder of the results; else $OUT, else benchmarks/results")
    return parser


def check(args: argparse.Namespace) -> None:
    """Raises a UserError where the seeds or epochs of `parser_of` are none."""
    if args.seeds < 1 or args.epochs <= 0:
        raise UserError(f"--seeds is {args.seeds} and --epochs {args.epochs:g}: both must be positive.")


def schedule_of(args: argparse.Namespace) -> list[str]:
    """Arguments of a run for the schedule, of which the first 15% warm up."""
    return ["--schedule.epochs", f"{args.epochs:g}", "--schedule.warmup_epochs", f"{0.15 * args.epochs:g}"]


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def begin(args: argparse.Namespace) -> Runner:
    """Places the images, and returns the function that trains on them, from `fashion_runner`."""
    place_fashion(args.data)
    return fashion_runner(args.data, args.out)


def trained_teacher(run: Runner, args: argparse.Namespace) -> Path:
    """The weights of a `fashion-teacher`, which is trained on all cores unless it is there."""
    print(f"teacher: top-1 {run('fashion-teacher', 'teacher', cores())['top1']:.2f}", flush=True)
    return args.out / "teacher" / "student.safetensors"


def run_all(
    run: Runner, args: argparse.Namespace, rows: Mapping[str, Sequence[str]], common: Sequence[str]
) -> dict[str, list[float]]:
    """Trains `fashion-scalekd` for each row and each seed: row -> top-1 of each seed in percent.

    Args:
        run: From `begin`.
        args: The command line arguments.
        rows: Row -> arguments of its runs.
        common: Arguments of every run.

    Raises:
        UserError: A run failed.
    """
    width = max(map(len, rows))

    def cell(row: str, seed: int) -> float:
        name = f"{row.replace(' ', '-').lower()}-seed{seed}"
        # the row's last, since it may change what is common
        result = run("fashion-scalekd", name, 1, *common, "--seed", str(seed), *rows[row])
        print(f"{row:<{width}} seed {seed}  top-1 {result['top1']:.2f}  {result['cpu_seconds']:.0f} CPU s", flush=True)
        return result["top1"]

    with ThreadPoolExecutor(args.jobs or cores()) as pool:
        # all rows of a seed before the next seed, so that the log soon has whole rounds
        jobs = {(row, seed): pool.submit(cell, row, seed) for seed in range(args.seeds) for row in rows}
        return {row: [jobs[row, seed].result() for seed in range(args.seeds)] for row in rows}


def summary(found: dict[str, list[float]], against: str) -> list[dict]:
    """Summarises each row: mean, standard deviation, and paired difference to one of them with its standard error.

    Args:
        found: Row -> top-1 of each seed in percent.
        against: The row to which the difference is taken.

    Returns:
        For each row `row`, `top1`, `mean`, `deviation`, `difference` and `error`, which are None where they are undefined.
    """
    rows = []
    for row, values in found.items():
        paired = [a - b for a, b in zip(values, found[against], strict=True)] if against in found else []
        several_seeds = len(values) > 1
        rows.append(
            {
                "row": row,
                "top1": values,
                "mean": statistics.mean(values),
                "deviation": statistics.stdev(values) if several_seeds else None,
                "difference": statistics.mean(paired) if paired else None,
                "error": statistics.stdev(paired) / len(paired) ** 0.5 if paired and several_seeds else None,
            }
        )
    return rows


def table(rows: list[dict], difference: str) -> str:
    """The rows of `summary` as a Markdown table.

    Args:
        rows: From `summary`.
        difference: Title of the column of paired differences.
    """

    def shown(value: float | None, sign: str = "") -> str:
        return "" if value is None else f"{value:{sign}.2f}"

    lines = [f"| row | top-1 | deviation | {difference} | error |", "|---|---|---|---|---|"]
    for r in rows:
        cells = [shown(r["mean"]), shown(r["deviation"]), shown(r["difference"], "+"), shown(r["error"])]
        lines.append(f"| {r['row']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
