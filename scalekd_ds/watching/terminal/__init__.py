"""What a person, or a program, sees of a run on rank 0's standard output."""

from __future__ import annotations

import sys

from scalekd_ds.watching.terminal.bar import Bar
from scalekd_ds.watching.terminal.json_lines import JsonLines
from scalekd_ds.watching.terminal.plain import Plain, Quiet

__all__ = ["Quiet", "reporter_for"]


def reporter_for(style: str, rank: int, total: int, done: int) -> Quiet:
    """The reporter of a style, silent on other ranks than 0.

    Args:
        style: `auto` (a bar on a terminal, lines elsewhere), `bar`, `plain`, `quiet` (or `none`), or `json`.
        rank: This rank.
        total: Optimizer steps of the run.
        done: Steps done before.
    """
    if style == "auto":
        style = "bar" if sys.stdout.isatty() else "plain"
    kinds = {"bar": Bar, "plain": Plain, "json": JsonLines}
    return kinds.get(style if rank == 0 else "quiet", Quiet)(total, done)
