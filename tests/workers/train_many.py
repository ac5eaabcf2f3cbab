"""Several runs of launch/train.py, one after the other in the same ranks: a file holds a JSON list of argument lists."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ranks import own_arguments

from scalekd_ds.recipes.command_line import parse_run
from scalekd_ds.training.trainer import train


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", type=Path)
    for arguments in json.loads(parser.parse_args(own_arguments()).runs.read_text()):
        cfg, _ = parse_run(arguments)
        train(cfg)


if __name__ == "__main__":
    main()
