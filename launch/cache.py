#!/usr/bin/env python3
"""Keeps a teacher's answers: `launch/cache.py --recipe NAME --views K --out DIR [--dotted.key value ...]`."""

from scalekd_ds.commands.cache import main
from scalekd_ds.errors import run_cli

if __name__ == "__main__":
    run_cli(main)
