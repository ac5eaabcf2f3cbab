"""Prints the table of `launch/train.py --list-recipes`, without importing torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from scalekd_ds.recipes import RECIPES


def print_recipes() -> None:
    """Prints each recipe: its models, their parameters (M, 10^6) and multiply-adds (G, 10^9), and how it trains."""
    sizes = json.loads(Path(__file__).with_name("sizes.json").read_text())
    table = Table(box=None, pad_edge=False)
    for header in "recipe|what it is|teacher|M|G|student|M|G|px|epochs|batch|optimizer".split("|"):
        is_number = header in ("M", "G", "px", "epochs", "batch")
        table.add_column(
            header,
            justify="right" if is_number else "left",
            no_wrap=is_number or header == "recipe",
            overflow="fold",
        )
    for name, recipe in RECIPES.items():
        cfg, about = recipe(), (recipe.__doc__ or "").strip().splitlines()[0].rstrip(".")

        def size_cells(role: str, name: str = name) -> list[str]:
            return [f"{value:.2f}" for value in sizes[name][role]] if role in sizes[name] else ["", ""]

        teacher = Path(cfg.teacher).name if cfg.teacher.endswith(".safetensors") else cfg.teacher
        optimizer = f"{cfg.optim.name} {cfg.learning_rate:g}"
        training = [f"{cfg.data.image_size}", f"{cfg.schedule.epochs:g}", f"{cfg.global_batch_size:,}", optimizer]
        table.add_row(name, about, teacher, *size_cells("teacher"), cfg.student, *size_cells("student"), *training)
    # wide enough that no line is broken where the output is not a terminal
    Console(width=None if sys.stdout.isatty() else 400, highlight=False).print(table)
