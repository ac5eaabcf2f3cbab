"""Runs as the cells of a table: one that is finished is not repeated, one that was cut goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from scalekd_ds.errors import UserError
from scalekd_ds.recipes.command_line import parse_run


def finished_run(script: Path, arguments: list[str], threads: int, log: Path) -> dict[str, Any]:
    """Runs `script`, launch/train.py, to its end, or reads the results of the same run from before.

    Args:
        script: launch/train.py.
        arguments: Of the run; a run that was cut is resumed.
        threads: Of the process.
        log: Where its output goes.

    Returns:
        What `results.json` holds.

    Raises:
        UserError: The run failed; its last line is in the message.
    """
    command = [*arguments, "--run.resume", "auto"]
    cfg, _ = parse_run(command)
    run_dir = Path(cfg.run.dir)
    results, config = run_dir / "results.json", run_dir / "config.json"
    # through JSON, so that tuples compare as the lists that were written
    if (
        results.is_file()
        and config.is_file()
        and json.loads(config.read_text()) == json.loads(json.dumps(cfg.as_dict()))
    ):
        return json.loads(results.read_text())
    log.parent.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with log.open("w") as out:
        done = subprocess.run([sys.executable, script, *command], env=env, stdout=out, stderr=subprocess.STDOUT)
    if done.returncode:
        last = log.read_text().strip().splitlines()[-1:] or ["no output"]
        raise UserError(f"{run_dir.name} failed with status {done.returncode} ({last[0]}); the whole log is {log}.")
    return json.loads(results.read_text())
