#!/usr/bin/env python3
"""What a run will need: `launch/plan.py --recipe NAME --gpus N --gpu-memory GIB [--dotted.key value ...]`."""

from scalekd_ds.commands.plan import main
from scalekd_ds.errors import run_cli

if __name__ == "__main__":
    run_cli(main)
