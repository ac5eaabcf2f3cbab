#!/usr/bin/env python3
"""A student for other tools: `launch/export.py --format timm|hf|onnx|torchscript|torch_export CKPT_OR_FILE OUT`."""

from scalekd_ds.commands.export import main
from scalekd_ds.errors import run_cli

if __name__ == "__main__":
    run_cli(main)
