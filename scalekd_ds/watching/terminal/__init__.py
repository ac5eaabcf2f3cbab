"""Reports a run on the standard output of rank 0, for people or for programs.

Its modules use the standard library and rich, and of this library `process` and `names` alone.
"""

from __future__ import annotations

import sys

from scalekd_ds.watching.terminal.bar import Bar
from scalekd_ds.watching.terminal.json_lines import JsonLines
from scalekd_ds.watching.terminal.plain import Plain, Reporter

__all__ = ["Reporter", "reporter_for"]


def reporter_for(style: str, rank: int, total: int, done: int) -> Reporter:
    """The reporter of a style; on other ranks than 0 it shows nothing.

    Args:
        style: `auto` (a bar on a terminal, lines elsewhere), `bar`, `plain`, `quiet` (or `none`), or `json`.
        rank: This rank.
        total: Optimizer steps of the run.
        done: Steps that were done before this start of the run.
    """
    if style == "auto":
        style = "bar" if sys.stdout.isatty() else "plain"
    reporters = {"bar": Bar, "plain": Plain, "json": JsonLines}
    return reporters.get(style if rank == 0 else "quiet", Reporter)(total, done)
