"""For verbs that need no accelerator, and need not say that they found none."""

from __future__ import annotations

import logging
import os


def on_cpu() -> None:
    """For the whole process, before DeepSpeed is imported."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.disable(logging.WARNING)
