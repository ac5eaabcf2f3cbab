"""Several runs of launch/train.py in the same ranks, without code for the CPU, which would take minutes to compile.

A file holds a JSON list of argument lists. Prints for each run the graphs that were made, the breaks in them, and the
recompilations, of which each is an error unless the run is of one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from ranks import own_arguments, tell
from torch._dynamo.utils import counters

from scalekd_ds.engine import compilation
from scalekd_ds.recipes.command_line import parse_run
from scalekd_ds.training.trainer import train

options_of_a_run = compilation.options


def options(deterministic: bool) -> dict[str, Any]:
    """Those of a run, with a backend that traces forward and backward, and runs the graphs as they are."""
    return {name: value for name, value in options_of_a_run(deterministic).items() if name != "options"} | {
        "backend": "aot_eager"
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", type=Path)
    compilation.options = options
    found = []
    for arguments in json.loads(parser.parse_args(own_arguments()).runs.read_text()):
        torch.compiler.reset()
        counters.clear()
        cfg, _ = parse_run(arguments)
        with torch._dynamo.config.patch(error_on_recompile=True):
            train(cfg)
        found.append({"graphs": counters["stats"]["unique_graphs"], "breaks": dict(counters["graph_break"])})
    tell(found)


if __name__ == "__main__":
    main()
