#!/usr/bin/env python3
"""A student to a Hugging Face hub: `launch/push.py RUN OWNER/NAME`."""

from scalekd_ds.commands.push import main
from scalekd_ds.errors import run_cli

if __name__ == "__main__":
    run_cli(main)
