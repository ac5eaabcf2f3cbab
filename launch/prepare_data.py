#!/usr/bin/env python3
"""Puts data in place, and checks it: `launch/prepare_data.py fashion-mnist runs/fashion-mnist`, `... verify DIR`."""

from scalekd_ds.commands.prepare_data import main
from scalekd_ds.errors import run_cli

if __name__ == "__main__":
    run_cli(main)
