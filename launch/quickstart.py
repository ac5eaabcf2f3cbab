#!/usr/bin/env python3
"""ScaleKD on Fashion-MNIST, on two CPU cores: `launch/quickstart.py`, which `make quickstart` runs."""

from scalekd_ds.commands.quickstart import main
from scalekd_ds.errors import run_cli

if __name__ == "__main__":
    run_cli(main)
