"""Runs a training in a process of its own, unless it is finished already; the quickstart and benchmarks fill tables so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scalekd_ds.cluster.job import run_job
from scalekd_ds.data import fashion
from scalekd_ds.errors import UserError
from scalekd_ds.names import escape
from scalekd_ds.process import signals
from scalekd_ds.recipes.command_line import parse_run
from scalekd_ds.teacher_cache.reader import TeacherCache
from scalekd_ds.teacher_cache.settings import adopt

# with -P, since a file of the current folder would else stand for a library of its name
SCALEKD = (sys.executable, "-P", "-m", "scalekd_ds")


def place_fashion(data: Path) -> None:
    """Writes Fashion-MNIST into the folder `data` unless it is there already, and says in a line what is there.

    Raises:
        UserError: The images are not on this machine, or cannot be written.
    """
    described = fashion.describe_existing(data, None) or fashion.write(data, *fashion.find(None, False))
    print(f"{escape(data)}: {described}", flush=True)


def log_of(out: Path, name: str) -> Path:
    """The file for the output of the run `name` of a table whose runs are in the folder `out`."""
    return out / "logs" / f"{name}.log"


def fashion_runner(data: Path, out: Path) -> Callable[..., dict[str, Any]]:
    """A function that runs a training on the images of a folder.

    Args:
        data: The folder of the images, with train/ and val/.
        out: The folder of the runs.

    Returns:
        A function of a recipe, the name of the run's folder in `out`, a number of threads, and further command line
        arguments of the run. It returns and raises as `finished_run`.
    """

    def run(recipe: str, name: str, threads: int, *more: str) -> dict[str, Any]:
        common = ["--data.root", str(data), "--run.dir", str(out / name), "--run.progress", "plain"]
        return finished_run(["--recipe", recipe, *common, *more], threads, log_of(out, name))

    return run


def finished_run(arguments: list[str], threads: int, log: Path) -> dict[str, Any]:
    """The results of a run, which is started, resumed where it was cut, or not repeated where it is finished.

    Args:
        arguments: Command line arguments of the run, as of `scalekd train`.
        threads: Number of threads of the process (OMP_NUM_THREADS).
        log: File for the output of the process.

    Returns:
        The contents of the run's `results.json`.

    Raises:
        UserError: The run failed (the message has the last line of its output), or its teacher cache cannot be used.
        ValueError: The arguments list the recipes.
    """
    command = [*arguments, "--run.resume", "auto"]
    parsed = parse_run(command)
    if parsed is None:
        raise ValueError(f"arguments is {arguments}: it must be a run, and not --list-recipes.")
    cfg, _ = parsed
    run_dir = Path(cfg.run.dir)
    results, config = run_dir / "results.json", run_dir / "config.json"
    if results.is_file() and config.is_file():
        if cfg.teacher_cache is not None:
            # the file has the run as it was trained: with the views of its cache
            cfg = adopt(cfg, TeacherCache(cfg.teacher_cache))
        # converted through JSON, so that tuples equal the lists in the file
        if json.loads(config.read_text()) == json.loads(json.dumps(cfg.as_dict())):
            return json.loads(results.read_text())
    run_logged("train", command, threads, log, run_dir.name)
    return json.loads(results.read_text())


def run_logged(verb: str, arguments: list[str], threads: int, log: Path, name: str) -> None:
    """Runs a verb in a process of its own, with its output in a file.

    Args:
        verb: The verb, as `train` or `cache`.
        arguments: Its command line arguments.
        threads: Number of threads of the process (OMP_NUM_THREADS).
        log: File for the output of the process.
        name: What it makes, for the error message.

    Raises:
        UserError: It failed; the message has the last line of its output.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with log.open("w") as out:
        status, number = run_job([*SCALEKD, verb, *arguments], env=env, stdout=out, stderr=subprocess.STDOUT)
    if number is not None:
        raise signals.Interrupted(number)
    if status:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:] or ["no output"]
        raise UserError(f"{name} failed with status {status} ({last[0]}); the whole log is {log}.")
