#!/usr/bin/env python3
"""Top-1 and top-5 of a consolidated file or any timm model: `launch/evaluate.py MODEL --data DIR`."""

from scalekd_ds.commands.evaluate import main
from scalekd_ds.errors import run_cli

if __name__ == "__main__":
    run_cli(main)
