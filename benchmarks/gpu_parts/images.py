"""JPEGs for the parts that load images."""

from __future__ import annotations

import os
from pathlib import Path

from loader import make_images


def make_folder(folder: Path, distinct: int, copies: int, size: tuple[int, int]) -> Path:
    """An ImageFolder of ten classes, each of whose `distinct` JPEGs in all has `copies` names: drawing them takes time."""
    made = make_images(folder, distinct, size)
    for path in sorted(made.glob("*/*.jpg")):
        for number in range(1, copies):
            os.link(path, path.with_name(f"{path.stem}-{number}.jpg"))
    return made
