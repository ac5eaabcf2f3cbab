#!/usr/bin/env python3
"""The paper's ablations on Fashion-MNIST: each part of ScaleKD removed, over several seeds: `make ablation`.

Every row is the recipe `fashion-scalekd` with one change. The rows of a seed share initialisation, images and their order, so
the difference to the full method is taken for each seed. Finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import os
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import harness

from scalekd_ds.errors import UserError, run_cli
from scalekd_ds.training.finished_run import fashion_runner, place_fashion

FULL = "ScaleKD"
ROWS: dict[str, tuple[str, ...]] = {
    FULL: (),
    "linear projector for CAP": ("--distill.projector", "linear"),
    "spatial view only": ("--distill.weights_s3", "[0.08, 0]", "--distill.weights_s4", "[0.08, 0]"),
    "frequency view only": ("--distill.weights_s3", "[0, 0.06]", "--distill.weights_s4", "[0, 0.06]"),
    "no TPP": ("--distill.tpp", "false"),
    "last stage only": ("--distill.weights_s3", "[0, 0]"),
    "no logit KD": ("--distill.kd_weight", "0"),
    "logit KD only": ("--distill.features", "false"),
    "no teacher": ("--teacher", "none"),
}


def run_rows(args: argparse.Namespace) -> dict[str, list[float]]:
    """Runs the ablations: row -> top-1 of each seed in percent.

    Args:
        args: The command line arguments.

    Raises:
        UserError: A run failed.
    """
    place_fashion(args.data)
    run = fashion_runner(args.data, args.out)
    cores = len(os.sched_getaffinity(0))
    teacher = run("fashion-teacher", "teacher", cores)
    print(f"teacher: top-1 {teacher['top1']:.2f}", flush=True)
    weights = str(args.out / "teacher" / "student.safetensors")
    schedule = ["--schedule.epochs", f"{args.epochs:g}", "--schedule.warmup_epochs", f"{0.15 * args.epochs:g}"]

    def cell(row: str, seed: int) -> float:
        name = f"{row.replace(' ', '-').lower()}-seed{seed}"
        result = run("fashion-scalekd", name, 1, "--teacher", weights, "--seed", str(seed), *schedule, *ROWS[row])
        print(f"{row:<26} seed {seed}  top-1 {result['top1']:.2f}  {result['cpu_seconds']:.0f} CPU s", flush=True)
        return result["top1"]

    with ThreadPoolExecutor(args.jobs or cores) as pool:
        # all rows of a seed before the next seed, so that the log soon has whole rounds
        jobs = {(row, seed): pool.submit(cell, row, seed) for seed in range(args.seeds) for row in args.rows}
        return {row: [jobs[row, seed].result() for seed in range(args.seeds)] for row in args.rows}


def summary(found: dict[str, list[float]], against: str = FULL) -> list[dict]:
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


def plot(rows: list[dict], path: Path) -> None:
    """Draws the rows of `summary` as a bar chart."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = rows[::-1]
    figure, axes = plt.subplots(figsize=(7, 0.42 * len(rows) + 1.2))
    axes.barh(
        [r["row"] for r in shown],
        [r["mean"] for r in shown],
        xerr=[r["deviation"] or 0.0 for r in shown],
        color=["tab:blue" if r["row"] == FULL else "lightsteelblue" for r in shown],
    )
    for place, row in enumerate(shown):
        axes.plot(row["top1"], [place] * len(row["top1"]), "k.", markersize=4)
    low = min(min(r["top1"]) for r in rows)
    axes.set_xlim(low - 1.0, max(max(r["top1"]) for r in rows) + 0.5)
    axes.set_xlabel(
        "Fashion-MNIST test top-1 in percent: points are seeds, bars their mean; the axis begins above 0", fontsize=8
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=30.0)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), help=f"some of: {', '.join(ROWS)}")
    parser.add_argument(
        "--jobs", type=int, default=0, help="runs at a time, with one thread each; 0 takes one per core"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="where the runs go")
    parser.add_argument("--data", type=Path, default=Path("runs/fashion-mnist"))
    parser.add_argument("--results", help="folder of the JSON, table and chart; else $OUT, else benchmarks/results")
    args = parser.parse_args()
    if unknown := [row for row in args.rows if row not in ROWS]:
        raise UserError(f"--rows has {unknown[0]!r}: it must be some of {', '.join(ROWS)}.")
    if args.seeds < 1 or args.epochs <= 0:
        raise UserError(f"--seeds is {args.seeds} and --epochs {args.epochs:g}: both must be positive.")
    rows = summary(run_rows(args))
    folder = harness.results_dir(args.results)
    result = {"benchmark": "ablation", "epochs": args.epochs, "seeds": args.seeds, "rows": rows}
    harness.write_json(folder / "ablation.json", result)
    plot(rows, folder / "ablation.png")
    lines = table(rows, "to the full method")
    (folder / "ablation.md").write_text(lines)
    print(lines, end="")


if __name__ == "__main__":
    run_cli(main)
