"""Runs one part in a process of its own: `python -m gpu_parts NAME FOLDER SECONDS [--dry-run]`, for `gpu.py`."""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from pathlib import Path

import harness
import timing

import gpu_parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=gpu_parts.PARTS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()

    def save(result: dict) -> None:
        harness.write_json(args.folder / f"{args.name}.json", result)

    so_far: dict = {}

    def keep(result: dict) -> None:
        so_far.update(result)
        save(so_far)

    part = importlib.import_module(f"gpu_parts.{args.name}")
    try:
        keep(part.run(args.folder, args.seconds, args.dry_run, keep))
    # of any kind: the log has the traceback, and the JSON what was found before
    except Exception as error:
        traceback.print_exc()
        keep({"failed": timing.one_line(error)})
        sys.exit(1)


if __name__ == "__main__":
    main()
