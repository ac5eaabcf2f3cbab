#!/usr/bin/env python3
"""Keeps a job going: `launch/supervise.py --hostfile launch/hosts -- --recipe NAME --run.dir DIR ...`."""

from scalekd_ds.commands.supervise import main
from scalekd_ds.errors import run_cli

if __name__ == "__main__":
    run_cli(main)
