#!/usr/bin/env python3
"""Plain student weights from a checkpoint of any ZeRO stage: `launch/consolidate.py CKPT OUT.safetensors`."""

from scalekd_ds.commands.consolidate import main
from scalekd_ds.errors import run_cli

if __name__ == "__main__":
    run_cli(main)
