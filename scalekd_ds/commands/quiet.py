"""Leaves out what other libraries print that tells a user nothing. `SCALEKD_VERBOSE=1` brings all of it back."""

from __future__ import annotations

import logging
import os
import warnings
from functools import partial

# set to anything but 0, all that libraries print is shown
VERBOSE = "SCALEKD_VERBOSE"

# Logger -> how its messages begin that nobody can act on. Errors are in no such list, nor is what points at a fault.
CHATTER: dict[str, tuple[str, ...]] = {
    # a run says its device itself
    "DeepSpeed": ("Setting accelerator to CPU.",),
    # nvcc without a GPU: what is compiled for a CPU does not use it
    "torch.utils.cpp_extension": ("No CUDA runtime is found, using CUDA_HOME=",),
}


def is_verbose() -> bool:
    """Whether the user asked for all that libraries print."""
    return os.environ.get(VERBOSE, "0") not in ("", "0")


def without_chatter() -> None:
    """Leaves out `CHATTER` in this process. It must be called before torch and DeepSpeed are imported, which log then."""
    if is_verbose():
        return
    # they tell the library's callers, among them DeepSpeed, what a later release will not take
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name, beginnings in CHATTER.items():
        logging.getLogger(name).addFilter(partial(_is_none_of, beginnings))


def _is_none_of(beginnings: tuple[str, ...], record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(beginnings)


def on_cpu() -> None:
    """Makes DeepSpeed use the CPU, and hides the warnings of all libraries, in this process.

    For verbs that need no accelerator. It must be called before DeepSpeed is imported.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if not is_verbose():
        logging.disable(logging.WARNING)
