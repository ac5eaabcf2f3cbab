"""Runs a training in a process of its own, unless it is finished already; benchmarks fill tables with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scalekd_ds.cluster.job import run_job
from scalekd_ds.errors import UserError
from scalekd_ds.process import signals
from scalekd_ds.recipes.command_line import parse_run


def fashion_runner(launch: Path, data: Path, out: Path) -> Callable[..., dict[str, Any]]:
    """Writes Fashion-MNIST unless it is there already, and returns a function that runs a training on it.

    Args:
        launch: The folder launch/.
        data: The folder of the images.
        out: The folder of the runs.

    Returns:
        A function of a recipe, the name of the run's folder in `out`, a number of threads, and further command line
        arguments of the run. It returns and raises as `finished_run`.

    Raises:
        SystemExit: The images cannot be written; launch/prepare_data.py has printed why.
    """
    prepared = subprocess.run([sys.executable, launch / "prepare_data.py", "fashion-mnist", data])
    if prepared.returncode:
        raise SystemExit(prepared.returncode)

    def run(recipe: str, name: str, threads: int, *more: str) -> dict[str, Any]:
        common = ["--data.root", str(data), "--run.dir", str(out / name), "--run.progress", "plain"]
        arguments = ["--recipe", recipe, *common, *more]
        return finished_run(launch / "train.py", arguments, threads, out / "logs" / f"{name}.log")

    return run


def finished_run(script: Path, arguments: list[str], threads: int, log: Path) -> dict[str, Any]:
    """The results of a run, which is started, resumed where it was cut, or not repeated where it is finished.

    Args:
        script: Path of launch/train.py.
        arguments: Command line arguments of the run.
        threads: Number of threads of the process (OMP_NUM_THREADS).
        log: File for the output of the process.

    Returns:
        The contents of the run's `results.json`.

    Raises:
        UserError: The run failed; the message has the last line of its output.
        ValueError: The arguments list the recipes.
    """
    command = [*arguments, "--run.resume", "auto"]
    parsed = parse_run(command)
    if parsed is None:
        raise ValueError(f"arguments is {arguments}: it must be a run, and not --list-recipes.")
    cfg, _ = parsed
    run_dir = Path(cfg.run.dir)
    results, config = run_dir / "results.json", run_dir / "config.json"
    # converted through JSON, so that tuples equal the lists in the file
    if (
        results.is_file()
        and config.is_file()
        and json.loads(config.read_text()) == json.loads(json.dumps(cfg.as_dict()))
    ):
        return json.loads(results.read_text())
    log.parent.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with log.open("w") as out:
        status, number = run_job([sys.executable, script, *command], env=env, stdout=out, stderr=subprocess.STDOUT)
    if number is not None:
        raise signals.Interrupted(number)
    if status:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:] or ["no output"]
        raise UserError(f"{run_dir.name} failed with status {status} ({last[0]}); the whole log is {log}.")
    return json.loads(results.read_text())
