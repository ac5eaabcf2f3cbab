"""The table of `launch/train.py --list-recipes`, made without importing torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from scalekd_ds.recipes import RECIPES


def print_recipes() -> None:
    """Each recipe with its models, their parameters in millions and multiply-adds in thousand millions (G), and its course."""
    sizes = json.loads(Path(__file__).with_name("sizes.json").read_text())
    table = Table(box=None, pad_edge=False)
    for name in (
        "recipe",
        "what it is",
        "teacher",
        "M",
        "G",
        "student",
        "M",
        "G",
        "px",
        "epochs",
        "batch",
        "optimizer",
    ):
        number = name in ("M", "G", "px", "epochs", "batch")
        table.add_column(
            name, justify="right" if number else "left", no_wrap=number or name == "recipe", overflow="fold"
        )
    for name, recipe in RECIPES.items():
        cfg, about = recipe(), (recipe.__doc__ or "").strip().splitlines()[0].rstrip(".")

        def cells(role: str, name: str = name) -> list[str]:
            return [f"{value:.2f}" for value in sizes[name][role]] if role in sizes[name] else ["", ""]

        teacher = Path(cfg.teacher).name if cfg.teacher.endswith(".safetensors") else cfg.teacher
        optimizer = f"{cfg.optim.name} {cfg.learning_rate:g}"
        course = [f"{cfg.data.image_size}", f"{cfg.schedule.epochs:g}", f"{cfg.global_batch_size:,}", optimizer]
        table.add_row(name, about, teacher, *cells("teacher"), cfg.student, *cells("student"), *course)
    # whole lines also where nobody looks at a terminal
    Console(width=None if sys.stdout.isatty() else 400, highlight=False).print(table)
