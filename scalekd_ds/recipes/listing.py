"""Prints the table of `launch/train.py --list-recipes`, without importing torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from scalekd_ds.recipes import RECIPES

_COLUMNS = (
    *("recipe", "what it is", "teacher", "M teacher", "G teacher", "student", "M student", "G student"),
    *("px", "epochs", "batch", "optimizer"),
)
_NUMBERS = ("M teacher", "G teacher", "M student", "G student", "px", "epochs", "batch")
# left out one after the other where the terminal is too narrow; a recipe's name says its teacher and student
_LEFT_OUT = ("what it is", "G teacher", "G student", "teacher", "student", "optimizer")


def print_recipes() -> None:
    """Prints each recipe: its models, their parameters (M, 10^6) and multiply-adds (G, 10^9), and how it trains."""
    # wide enough that no line is broken where the output is not a terminal
    wide = Console(width=400)
    console = Console(width=None if sys.stdout.isatty() else wide.width, highlight=False)
    rows, left_out = _rows(), 0
    while wide.measure(_table(rows, _LEFT_OUT[:left_out])).maximum > console.width and left_out < len(_LEFT_OUT):
        left_out += 1
    console.print(_table(rows, _LEFT_OUT[:left_out]))
    if left_out:
        console.print(
            "\nM: 10^6 parameters; G: 10^9 multiply-adds. In a wider terminal, and in `scalekd recipes | less -S`, also: "
            f"{', '.join(_LEFT_OUT[:left_out])}."
        )


def _table(rows: list[dict[str, str]], left_out: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False)
    columns = [column for column in _COLUMNS if column not in left_out]
    for column in columns:
        is_number = column in _NUMBERS
        table.add_column(column, justify="right" if is_number else "left", no_wrap=True, overflow="fold")
    for row in rows:
        table.add_row(*(row[column] for column in columns))
    return table


def _rows() -> list[dict[str, str]]:
    """For each recipe the text of each column."""
    sizes = json.loads(Path(__file__).with_name("sizes.json").read_text())
    rows = []
    for name, recipe in RECIPES.items():
        cfg, about = recipe(), (recipe.__doc__ or "").strip().splitlines()[0].rstrip(".")
        row = {"recipe": name, "what it is": about, "student": cfg.student}
        row["teacher"] = Path(cfg.teacher).name if cfg.teacher.endswith(".safetensors") else cfg.teacher
        for role in ("teacher", "student"):
            millions, multiply_adds = (
                (f"{value:.2f}" for value in sizes[name][role]) if role in sizes[name] else ("", "")
            )
            row |= {f"M {role}": millions, f"G {role}": multiply_adds}
        row |= {"px": f"{cfg.data.image_size}", "epochs": f"{cfg.schedule.epochs:g}"}
        row |= {"batch": f"{cfg.global_batch_size:,}", "optimizer": f"{cfg.optim.name} {cfg.learning_rate:g}"}
        rows.append(row)
    return rows
