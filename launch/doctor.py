#!/usr/bin/env python3
"""Whether a job can start on these nodes: `launch/doctor.py --hostfile launch/hosts [--recipe NAME ...]`."""

from scalekd_ds.commands.doctor import main
from scalekd_ds.errors import run_cli

if __name__ == "__main__":
    run_cli(main)
