"""Caches and runs, one after the other in the same ranks, of a file with a list of {"cache": options or null, "run": words}."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ranks import own_arguments

from scalekd_ds.caching.job import make_cache
from scalekd_ds.caching.options import CacheOptions
from scalekd_ds.recipes.command_line import parse_run
from scalekd_ds.training.trainer import train


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", type=Path)
    for each in json.loads(parser.parse_args(own_arguments()).runs.read_text()):
        cfg, _ = parse_run(each["run"])
        if each["cache"] is None:
            train(cfg)
        else:
            make_cache(cfg, CacheOptions(**{**each["cache"], "out": Path(each["cache"]["out"])}))


if __name__ == "__main__":
    main()
