#!/usr/bin/env python3
"""Trains a student: `deepspeed --hostfile launch/hosts launch/train.py --recipe NAME [--dotted.key value ...]`."""

from scalekd_ds.commands.train import main
from scalekd_ds.errors import run_cli

if __name__ == "__main__":
    run_cli(main)
