"""A run's monitors without its models: they start, log three steps, and are broken after the first where it is asked."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

from ranks import own_arguments

from scalekd_ds.engine import ds_config
from scalekd_ds.engine.processes import start_processes
from scalekd_ds.errors import run_cli
from scalekd_ds.watching.monitor import Monitor


def fill(folder: Path) -> None:
    """Every file in a folder becomes one on a full disk."""
    for file in folder.iterdir():
        file.unlink()
        file.symlink_to("/dev/full")


def kill_service(_: Path) -> None:
    """Ends the process of Weights & Biases that sends what is logged."""
    import psutil

    for child in psutil.Process().children(recursive=True):
        child.kill()


BREAKAGES = {"full": fill, "gone": shutil.rmtree, "service": kill_service}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("monitors")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--packages", help="folder of packages that hide the installed ones")
    parser.add_argument("--breakage", choices=BREAKAGES)
    parser.add_argument("--broken", help="the monitor's folder")
    arguments = parser.parse_args(own_arguments())
    if arguments.packages:
        sys.path.insert(0, arguments.packages)
        hidden = [p.stem for p in Path(arguments.packages).iterdir()]
        for name in [n for n in sys.modules if n.partition(".")[0] in hidden]:
            del sys.modules[name]
    os.chdir(arguments.run_dir)
    monitors = ds_config.monitors({}, arguments.run_dir, arguments.monitors)
    start_processes()
    monitor = Monitor(monitors)
    monitor.begin(0, "summary", {"lr": 0.1})
    for step in (1, 2, 3):
        monitor.log(step, {"loss/total": 1.0 / step, "optim/lr": 0.1})
        if step == 1 and arguments.breakage:
            BREAKAGES[arguments.breakage](arguments.run_dir / arguments.broken)
    monitor.end()
    print("TRAINED", flush=True)


if __name__ == "__main__":
    run_cli(main)
