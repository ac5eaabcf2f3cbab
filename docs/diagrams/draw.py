"""Draws the diagrams of the documents: `make diagrams`, or `python docs/diagrams/draw.py [FOLDER]`."""

from __future__ import annotations

import sys
from pathlib import Path

import method_figure
import step_figure
import traced

FIGURES = {"method.svg": method_figure.draw, "step.svg": step_figure.draw}


def main(folder: Path) -> None:
    """Writes every figure into `folder`."""
    shapes = traced.trace()
    for name, draw in FIGURES.items():
        (folder / name).write_text(draw(shapes), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
