#!/usr/bin/env python3
"""ScaleKD on Fashion-MNIST, on two CPU cores: a teacher, then CE, CE + logit KD and ScaleKD on 1,000 images.

`make quickstart` runs it. Each row of the table is one run of launch/train.py for each seed. Runs that have finished
are not repeated, and interrupted ones are resumed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from scalekd_ds.errors import UserError, run_cli
from scalekd_ds.training.finished_run import fashion_runner

LAUNCH = Path(__file__).resolve().parent
METHODS = {"ce": "CE (no teacher)", "kd": "CE + logit KD", "scalekd": "ScaleKD"}


def table(rows: list[tuple], teacher: dict, seeds: int) -> str:
    """The results as plain text.

    Args:
        rows: (student, epochs, top-1 in percent of each seed, CPU seconds of each seed); the first row is the baseline.
        teacher: Result of the teacher's run.
        seeds: Number of seeds.
    """
    header = ("student", "epochs", "test top-1", "CPU s", "over CE")
    baseline = statistics.mean(rows[0][2])
    cells = [header]
    for name, epochs, accuracies, seconds in rows:
        mean = statistics.mean(accuracies)
        spread = f" +- {statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
        gain = "" if name == rows[0][0] else f"{mean - baseline:+.2f}"
        cells.append((name, f"{epochs:g}", f"{mean:.2f}{spread}", f"{statistics.mean(seconds):.0f}", gain))
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells]
    lines.insert(1, "  ".join("-" * w for w in widths))
    note = "one seed: a difference below a point may be chance; --seeds 3 gives the spread" if seeds == 1 else ""
    teacher_line = f"teacher (Swin, all training images): {teacher['top1']:.2f}, {teacher['cpu_seconds']:.0f} CPU s"
    return "\n".join([*lines, teacher_line, *([note] if note else [])])


def main() -> None:
    """Prepares the data, trains the teacher and every student, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--seeds", type=int, default=1, help="runs of each row; from 2 on, a row of KD at equal compute is added"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="where the runs go")
    parser.add_argument("--data", type=Path, default=Path("runs/fashion-mnist"), help="where the images go")
    parser.add_argument("--train-args", nargs=argparse.REMAINDER, default=[], help="further arguments of every run")
    args = parser.parse_args()
    if args.seeds < 1:
        raise UserError(f"--seeds is {args.seeds}: it must be at least 1.")
    started = time.time()
    run_fashion = fashion_runner(LAUNCH, args.data, args.out)
    cores = len(os.sched_getaffinity(0))

    def run(recipe: str, name: str, threads: int, *options: str) -> dict:
        result = run_fashion(recipe, name, threads, *options, *args.train_args)
        print(f"{name:<16} top-1 {result['top1']:.2f}  {result['cpu_seconds']:.0f} CPU s", flush=True)
        return result

    print("training the teacher: a Swin on all training images, about two minutes", flush=True)
    teacher = run("fashion-teacher", "teacher", cores)
    weights = str(args.out / "teacher" / "student.safetensors")

    def student(method: str, seed: int, epochs: float | None = None) -> dict:
        options = ["--seed", str(seed)]
        if method != "ce":
            options += ["--teacher", weights]
        name = f"{method}-seed{seed}"
        if epochs is not None:
            # the warm-up keeps its share of the run
            options += ["--schedule.epochs", f"{epochs:g}", "--schedule.warmup_epochs", f"{0.15 * epochs:g}"]
            name = f"{method}-equal-seed{seed}"
        return run(f"fashion-{method}", name, 1, *options)

    print("distilling: one thread a run, as many runs at once as there are cores (at most 4)", flush=True)
    seeds = range(args.seeds)
    with ThreadPoolExecutor(min(cores, 4)) as pool:
        # the longest runs start first, so that all cores are busy until the end
        jobs = {(m, s): pool.submit(student, m, s) for m in reversed(METHODS) for s in seeds}
        results = {key: job.result() for key, job in jobs.items()}
        rows = []
        for method, title in METHODS.items():
            runs = [results[method, s] for s in seeds]
            rows.append((title, 30, [r["top1"] for r in runs], [r["cpu_seconds"] for r in runs]))
        if args.seeds > 1:
            # logit KD for as many epochs as take the CPU time of ScaleKD
            epochs = round(30 * statistics.mean(rows[2][3]) / statistics.mean(rows[1][3]))
            runs = list(pool.map(lambda s: student("kd", s, epochs), seeds))
            accuracies = [r["top1"] for r in runs]
            rows.append(("CE + logit KD, equal CPU", epochs, accuracies, [r["cpu_seconds"] for r in runs]))

    check_plain_weights(args.out / "scalekd-seed0" / "student.safetensors")
    text = table(rows, teacher, args.seeds)
    data = json.loads((args.data / "dataset.json").read_text())
    print(f"\n{data['origin']}; students see 1,000 images; {args.seeds} seed(s)\n\n{text}\n")
    (args.out / "table.txt").write_text(text + "\n")
    print(f"took {(time.time() - started) / 60:.1f} minutes")
    print(f"plain weights, loaded strictly by timm: {args.out / 'scalekd-seed0' / 'student.safetensors'}")
    print(f"curves of every loss term: tensorboard --logdir {args.out}")


def check_plain_weights(weights: Path) -> None:
    """Loads the file with timm alone, as any user of the student would; raises where a name or shape differs."""
    import timm
    from safetensors.torch import load_file

    card = json.loads(weights.with_suffix(".json").read_text())
    model = timm.create_model(card["architecture"], num_classes=card["num_classes"], **card["model_kwargs"])
    model.load_state_dict(load_file(weights), strict=True)


if __name__ == "__main__":
    run_cli(main)
