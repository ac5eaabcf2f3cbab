"""ScaleKD on Fashion-MNIST, on two CPU cores: a teacher, then CE, CE + logit KD and ScaleKD on 1,000 images.

`scalekd quickstart`. Each row of the table is one `scalekd train` for each seed. Runs that have finished are not repeated,
and interrupted ones are resumed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from scalekd_ds.commands.parser import Parser
from scalekd_ds.errors import UserError
from scalekd_ds.names import escape, shell_word

METHODS = {"ce": "CE (no teacher)", "kd": "CE + logit KD", "scalekd": "ScaleKD"}
# images that a student sees
IMAGES = 1000
# of the students, and of a quick look
EPOCHS, QUICK_EPOCHS = 30, 6
# of the teacher in a quick look, in place of three epochs of all images
QUICK_TEACHER = ("--schedule.epochs", "1", "--schedule.warmup_epochs", "0.15", "--data.train_images")
QUICK_TEACHER_IMAGES = 20_000


def parser() -> Parser:
    """The verb's options."""
    about = "Distils a small CNN from a small Swin, and compares it with training alone: about six minutes on two CPU cores."
    options = Parser("quickstart", about)
    options.add_argument(
        "--seeds", type=int, default=1, help="runs of each row; from 2 on, a row of KD at equal compute is added"
    )
    options.add_argument(
        "--quick",
        action="store_true",
        help="three minutes: shows that all works; too few epochs to compare the methods by",
    )
    options.add_argument("--out", type=Path, help="where the runs go: runs/quickstart, or runs/quickstart-quick")
    options.add_argument(
        "--data",
        type=Path,
        default=Path("runs/fashion-mnist"),
        help="where the images are, or go if it is empty: a folder with train/ and val/ of your own, or with Fashion-MNIST's "
        "four idx files (default: runs/fashion-mnist)",
    )
    options.add_argument("--train-args", nargs=argparse.REMAINDER, default=[], help="further arguments of every run")
    return options


def place_images(data: Path, out: Path) -> tuple[Path, str, int]:
    """Finds or writes the images, and says in one line which they are.

    Args:
        data: The folder that the user named: own images in train/ and val/, idx files, or missing or empty.
        out: The folder of the runs, below which images from idx files go.

    Returns:
        The folder with train/ and val/, what it holds in words, and how many training images.

    Raises:
        UserError: There are none, or they cannot be written.
    """
    from scalekd_ds.data import fashion
    from scalekd_ds.data.sources.open import open_source

    own = not (data / fashion.RECORD).is_file() and (data / "train").is_dir() and (data / "val").is_dir()
    packed = [name for pair in fashion.FILES.values() for name in pair]
    if own:
        root, described = data, f"your own images from {escape(data)}, made 32 pixels wide and high"
    elif any((data / f"{name}{end}").is_file() for name in packed for end in ("", ".gz")):
        root = out / "images"
        described = fashion.describe_existing(root, None) or fashion.write(root, *fashion.find(data, False))
    else:
        if data.is_dir() and any(data.iterdir()) and not (data / fashion.RECORD).is_file():
            raise UserError(
                f"--data is {escape(data)}: it must hold train/ and val/ with a folder of images for each class, or "
                "Fashion-MNIST's four idx files; or name a new folder, into which Fashion-MNIST goes."
            )
        root, ways = data, "give a folder of images as --data DIR"
        existing = fashion.describe_existing(root, None)
        if existing is None and not fashion.DEBIAN.is_dir():
            print("no Fashion-MNIST on this machine: fetching it, 30 MB", flush=True)
        described = existing or fashion.write(root, *fashion.find(None, True, ways))
    count = len(open_source(root / "train", "--data"))
    print(f"images: {described}" + (f"; {count:,} to train on" if own else ""), flush=True)
    return root, described, count


def table(
    rows: list[tuple[str, float, list[float], list[float]]], teacher: dict[str, Any], seeds: int, seen: str
) -> str:
    """The results as plain text.

    Args:
        rows: (student, epochs, top-1 in percent of each seed, CPU seconds of each seed); the first row is the baseline.
        teacher: Result of the teacher's run.
        seeds: Number of seeds.
        seen: How many images the teacher saw, in words.
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
    teacher_line = f"teacher (Swin, {seen} images): {teacher['top1']:.2f}, {teacher['cpu_seconds']:.0f} CPU s"
    return "\n".join([*lines, teacher_line, *([note] if note else [])])


def run_rows(
    run: Callable[..., dict[str, Any]], args: argparse.Namespace, weights: Path, images: int
) -> list[tuple[str, float, list[float], list[float]]]:
    """Trains the students, and returns the rows of `table`.

    Args:
        run: Runs a training: a function of recipe, name, threads and further arguments.
        args: The verb's options.
        weights: File of the trained teacher.
        images: Number of training images that there are.

    Raises:
        UserError: A run failed.
    """
    regular = QUICK_EPOCHS if args.quick else EPOCHS

    def student(method: str, seed: int, epochs: float = regular) -> dict[str, Any]:
        options = ["--seed", str(seed)]
        if method != "ce":
            options += ["--teacher", str(weights)]
        if epochs != EPOCHS:
            # the warm-up keeps its share of the run
            options += ["--schedule.epochs", f"{epochs:g}", "--schedule.warmup_epochs", f"{0.15 * epochs:g}"]
        if images < IMAGES:
            options += ["--data.train_images", "null"]
        name = f"{method}-seed{seed}" if epochs == regular else f"{method}-equal-seed{seed}"
        return run(f"fashion-{method}", name, 1, *options)

    def row(title: str, epochs: float, runs: list[dict[str, Any]]) -> tuple[str, float, list[float], list[float]]:
        return title, epochs, [r["top1"] for r in runs], [r["cpu_seconds"] for r in runs]

    seeds = range(args.seeds)
    with ThreadPoolExecutor(min(cores(), 4)) as pool:
        # the longest runs start first, so that all cores are busy until the end
        jobs = {(m, s): pool.submit(student, m, s) for m in reversed(METHODS) for s in seeds}
        results = {key: job.result() for key, job in jobs.items()}
        rows = [row(title, regular, [results[method, s] for s in seeds]) for method, title in METHODS.items()]
        if args.seeds > 1:
            # logit KD for as many epochs as take the CPU time of ScaleKD
            epochs = round(regular * statistics.mean(rows[2][3]) / statistics.mean(rows[1][3]))
            runs = list(pool.map(lambda s: student("kd", s, epochs), seeds))
            rows.append(row("CE + logit KD, equal CPU", epochs, runs))
    return rows


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def check_plain_weights(weights: Path) -> None:
    """Loads the file with timm alone, as any user of the student would; raises where a name or shape differs."""
    import timm
    from safetensors.torch import load_file

    card = json.loads(weights.with_suffix(".json").read_text())
    model = timm.create_model(card["architecture"], num_classes=card["num_classes"], **card["model_kwargs"])
    model.load_state_dict(load_file(weights), strict=True)


def main(argv: list[str] | None = None) -> None:
    """Prepares the data, trains the teacher and every student, and prints the table."""
    args = parser().parse_args(argv)
    if args.seeds < 1:
        raise UserError(f"--seeds is {args.seeds}: it must be at least 1.")
    from scalekd_ds.training.finished_run import fashion_runner, log_of
    from scalekd_ds.watching.terminal.several_runs import runs_shown

    started = time.time()
    out = args.out or Path("runs/quickstart-quick" if args.quick else "runs/quickstart")
    # before the images are written, so that a folder that cannot be used is told at once
    log_of(out, "teacher").parent.mkdir(parents=True, exist_ok=True)
    minutes = (2 + args.seeds) if args.quick else (4 + 2 * args.seeds)
    print(
        f"about {minutes} minutes on two CPU cores; here are {cores()}. Ctrl-C stops, the same command goes on.",
        flush=True,
    )
    root, described, count = place_images(args.data, out)
    start_run = fashion_runner(root, out)
    teacher_images = min(QUICK_TEACHER_IMAGES, count) if args.quick else count
    seen = f"{teacher_images:,}" if teacher_images < count else "all training"
    quick_teacher = [*QUICK_TEACHER, str(teacher_images)] if args.quick else []

    with runs_shown() as (begin, end):

        def run(recipe: str, name: str, threads: int, *options: str) -> dict[str, Any]:
            begin(name, log_of(out, name))
            result = start_run(recipe, name, threads, *options, *args.train_args)
            end(name, f"top-1 {result['top1']:.2f}  {result['cpu_seconds']:.0f} CPU s")
            return result

        print(f"training the teacher: a Swin on {seen} images", flush=True)
        teacher = run("fashion-teacher", "teacher", cores(), *quick_teacher)
        print("distilling: one thread a run, as many runs at once as there are cores (at most 4)", flush=True)
        rows = run_rows(run, args, out / "teacher" / "student.safetensors", count)

    shipped = out / "scalekd-seed0" / "student.safetensors"
    check_plain_weights(shipped)
    text = table(rows, teacher, args.seeds, seen)
    if args.quick:
        text += f"\n--quick is {QUICK_EPOCHS} epochs in place of {EPOCHS}: too few to compare the methods by"
    print(f"\n{described}; students see {min(IMAGES, count):,} images; {args.seeds} seed(s)\n\n{text}\n")
    (out / "table.txt").write_text(text + "\n")
    print(f"took {(time.time() - started) / 60:.1f} minutes")
    print(f"plain weights, loaded strictly by timm: {escape(shipped)}")
    print(f"curves of every loss term: tensorboard --logdir {shell_word(out)}")
    teacher_file = shell_word(out / "teacher" / "student.safetensors")
    few = " --data.train_images null" if count < IMAGES else ""
    print("next, one run with a setting of your own, of which `scalekd train --help` lists all:")
    print(f"scalekd train --recipe fashion-scalekd --data.root {shell_word(root)} --teacher {teacher_file}{few} \\")
    print("  --run.dir runs/mine --optim.lr 1e-3")
