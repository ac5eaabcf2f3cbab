"""The images of a sheet: found, chosen, read, and cut as validation images are."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from scalekd_ds.data.sources.image_folder import EXTENSIONS
from scalekd_ds.errors import UserError

_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}


class Cut(NamedTuple):
    """How an image becomes a square: resize the shorter side to `shorter`, by `filter`, and take the middle `side`."""

    side: int
    shorter: int
    filter: str


def find_images(given: Sequence[str]) -> list[Path]:
    """Files of folders (with everything below; of val/ where a folder has one), files and globs, each once, sorted.

    Raises:
        UserError: One of them names no image.
    """
    found: dict[Path, None] = {}
    for name in given:
        path = Path(name)
        if path.is_dir():
            folder = path / "val" if (path / "val").is_dir() else path
            files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS)
        elif path.is_file():
            files = [path]
        else:
            files = sorted(p for p in map(Path, glob.glob(name, recursive=True)) if p.suffix.lower() in EXTENSIONS)
        if not files:
            raise UserError(
                f"no images found at {name!r}: give a folder, files or a quoted glob of {', '.join(EXTENSIONS)}."
            )
        found.update(dict.fromkeys(files))
    return list(found)


def spread(paths: Sequence[Path], count: int) -> list[Path]:
    """All of `paths`, those first that show most: one of each folder in turn, from evenly over each folder."""
    folders: dict[Path, list[Path]] = {}
    for path in paths:
        folders.setdefault(path.parent, []).append(path)
    rounds = -(-count // len(folders))
    for folder, files in folders.items():
        step = max(1, len(files) // rounds)
        first = files[::step]
        folders[folder] = first + [f for f in files if f not in set(first)]
    longest = max(map(len, folders.values()))
    return [files[i] for i in range(longest) for files in folders.values() if i < len(files)]


def read(path: Path, cut: Cut) -> torch.Tensor:
    """(3, side, side) in 0 to 1.

    Raises:
        OSError: It cannot be read or decoded.
    """
    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
    except (UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OSError(str(error)) from None
    scale = cut.shorter / min(image.size)
    w, h = (max(cut.side, round(length * scale)) for length in image.size)
    left, top = (w - cut.side) // 2, (h - cut.side) // 2
    image = image.resize((w, h), _FILTERS.get(cut.filter, Image.Resampling.BICUBIC))
    square = np.asarray(image.crop((left, top, left + cut.side, top + cut.side)))
    return torch.from_numpy(square.copy()).permute(2, 0, 1).float() / 255


def readable(paths: Iterable[Path], cut: Cut) -> Iterator[tuple[Path, torch.Tensor]]:
    """(path, pixels) of each file that can be read; one that cannot is named and skipped."""
    for path in paths:
        try:
            yield path, read(path, cut)
        except OSError as error:
            print(f"skipped {path}: {' '.join(str(error).split())}", flush=True)


def true_class(path: Path, folders: Sequence[str] | None) -> int | None:
    """The class that the file's folder names, or None."""
    return folders.index(path.parent.name) if folders and path.parent.name in folders else None
