"""Finds, chooses and reads the images of a sheet, and crops them as validation images are cropped."""

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


class Crop(NamedTuple):
    """How an image is made a square.

    Attributes:
        side: Side of the centre crop in pixels.
        shorter: Length to which the shorter side of the image is resized first, in pixels.
        filter: Interpolation of the resize, such as `bicubic`.
    """

    side: int
    shorter: int
    filter: str


def find_images(given: Sequence[str]) -> list[Path]:
    """The image files that folders, files and globs name, each once.

    A folder stands for all images below it, or below its val/ if it has one. The files of each folder and glob are sorted.

    Raises:
        UserError: One of the names has no image.
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


def spread_over_folders(paths: Sequence[Path], count: int) -> list[Path]:
    """All of `paths`, ordered so that the first `count` are spread over the folders, and evenly over each folder.

    Args:
        paths: Files.
        count: How many of them will be shown.
    """
    folders: dict[Path, list[Path]] = {}
    for path in paths:
        folders.setdefault(path.parent, []).append(path)
    per_folder = -(-count // len(folders))
    for folder, files in folders.items():
        step = max(1, len(files) // per_folder)
        first = files[::step]
        folders[folder] = first + [f for f in files if f not in set(first)]
    longest = max(map(len, folders.values()))
    return [files[i] for i in range(longest) for files in folders.values() if i < len(files)]


def read_image(path: Path, crop: Crop) -> torch.Tensor:
    """Reads and crops an image: (3, side, side) in 0 to 1.

    Raises:
        OSError: The file cannot be read or decoded.
    """
    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
    except (UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OSError(str(error)) from None
    scale = crop.shorter / min(image.size)
    w, h = (max(crop.side, round(length * scale)) for length in image.size)
    left, top = (w - crop.side) // 2, (h - crop.side) // 2
    image = image.resize((w, h), _FILTERS.get(crop.filter, Image.Resampling.BICUBIC))
    square = np.asarray(image.crop((left, top, left + crop.side, top + crop.side)))
    return torch.from_numpy(square.copy()).permute(2, 0, 1).float() / 255


def readable_images(paths: Iterable[Path], crop: Crop) -> Iterator[tuple[Path, torch.Tensor]]:
    """Yields (path, pixels (3, side, side) in 0 to 1) of each file; one that cannot be read is skipped with a message."""
    for path in paths:
        try:
            yield path, read_image(path, crop)
        except OSError as error:
            print(f"skipped {path}: {' '.join(str(error).split())}", flush=True)


def true_class(path: Path, folders: Sequence[str] | None) -> int | None:
    """The class whose folder name is that of the file's folder, or None if it is none of `folders`."""
    return folders.index(path.parent.name) if folders and path.parent.name in folders else None
