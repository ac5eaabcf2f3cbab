"""`scalekd train` several times in one process: a file holds a JSON list of argument lists.

Each rank writes what is left after each run beside that file: what two ranks print may meet in one line.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
from ranks import own_arguments

from scalekd_ds.commands.train import main as train


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", type=Path)
    parser.add_argument("--own-group", action="store_true", help="the process group is this script's")
    given, left = parser.parse_args(own_arguments()), []
    if given.own_group:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    for arguments in json.loads(given.runs.read_text()):
        train(arguments)
        left.append(torch.distributed.is_initialized())
    given.runs.with_name(f"left-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(left))


if __name__ == "__main__":
    main()
