"""Silences DeepSpeed for verbs that need no accelerator."""

from __future__ import annotations

import logging
import os


def on_cpu() -> None:
    """Makes DeepSpeed use the CPU, and hides its warnings, in this process.

    It must be called before DeepSpeed is imported.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.disable(logging.WARNING)
