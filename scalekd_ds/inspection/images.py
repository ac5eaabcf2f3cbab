"""Finds, chooses and reads the images of a sheet, and crops them as validation images are cropped."""

from __future__ import annotations

import glob
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from scalekd_ds.class_names import are_numbers, positions_in
from scalekd_ds.data.centre_crop import centre_view
from scalekd_ds.data.sources.labels import is_number
from scalekd_ds.data.sources.open import is_packed, open_source
from scalekd_ds.data.sources.source import Source
from scalekd_ds.data.sources.what_counts import EXTENSIONS, hidden_part, is_image_name
from scalekd_ds.errors import UserError, cause_of
from scalekd_ds.names import escape, one_line, text_of

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


@dataclass(frozen=True, eq=False)
class SourceImage:
    """An image of a tar, a TFRecord, a table or a data set of Hugging Face, with what a `Path` offers here.

    Attributes:
        source: The source.
        index: Position in it.
    """

    source: Source
    index: int

    @property
    def parent(self) -> Path:
        """The name of its class, as a folder."""
        return Path(self.source.classes[self.source.labels[self.index]])

    @property
    def name(self) -> str:
        """The last part of its name."""
        return self.source.name(self.index).rpartition("/")[2]

    def __str__(self) -> str:
        return self.source.name(self.index)


# numbers from here on are no positions in any list of classes
_MOST_CLASSES = 1_000_000

AnyImage = Path | SourceImage


def _images_of_source(where: str) -> list[SourceImage] | None:
    """The images of a source that is no folder of files; None where `where` names none."""
    if not is_packed(where):
        return None

    def numbers_or_names(names: list[str]) -> list[str]:
        # labels that are numbers are positions in the student's classes, of which some may not occur; dates are none
        numbers = all(is_number(name) and "." not in name and int(name) < _MOST_CLASSES for name in names)
        return [str(i) for i in range(max(1, *map(int, names)) + 1)] if numbers else names

    source = open_source(where, "IMAGES", numbers_or_names)
    return [SourceImage(source, i) for i in range(len(source))]


def _images_below(folder: Path) -> list[Path]:
    below = (p for p in folder.rglob("*") if is_image_name(p.name) and p.is_file())
    return sorted(p for p in below if not hidden_part(p.relative_to(folder).as_posix()))


def find_images(given: Sequence[str]) -> list[AnyImage]:
    """The images that folders, files, globs and sources of training name, each once.

    A folder stands for all images below it, or below its val/ if it has one. The files of each folder and glob are sorted.

    Raises:
        UserError: One of the names has no image.
    """
    found: dict[AnyImage, None] = {}
    for name in given:
        path = Path(name)
        folder = path / "val" if (path / "val").is_dir() else path
        if (images := _images_of_source(name if path == folder else str(folder))) is not None:
            found.update(dict.fromkeys(images))
            continue
        if path.is_dir():
            files = _images_below(folder)
        elif path.is_file():
            files = [path]
        else:
            matches = sorted(map(Path, glob.glob(name, recursive=True)))
            # a pipe would be waited for without end
            files = [p for p in matches if is_image_name(p.name) and p.is_file()]
            # as a shell would give them one by one
            files = files or [image for p in matches if p.is_dir() for image in _images_below(p)]
        if not files:
            raise UserError(
                f"no images found at {name!r}: give a folder, files or a quoted glob of {', '.join(EXTENSIONS)}, or a "
                "source of training."
            )
        found.update(dict.fromkeys(files))
    return list(found)


def spread_over_folders(paths: Sequence[AnyImage], count: int) -> list[AnyImage]:
    """All of `paths`, ordered so that the first `count` are spread over the folders, and evenly over each folder.

    Args:
        paths: Files.
        count: How many of them will be shown.
    """
    folders: dict[Path, list[AnyImage]] = {}
    for path in paths:
        folders.setdefault(path.parent, []).append(path)
    per_folder = -(-count // len(folders))
    for folder, files in folders.items():
        step = max(1, len(files) // per_folder)
        first = files[::step]
        folders[folder] = first + [f for f in files if f not in set(first)]
    longest = max(map(len, folders.values()))
    return [files[i] for i in range(longest) for files in folders.values() if i < len(files)]


def read_image(path: AnyImage, crop: Crop) -> torch.Tensor:
    """Reads and crops an image: (3, side, side) in 0 to 1.

    Raises:
        OSError: The file cannot be read or decoded.
    """
    try:
        file = path if isinstance(path, Path) else io.BytesIO(path.source.read(path.index).tobytes())
        with Image.open(file) as opened:
            image = opened.convert("RGB")
    # Pillow raises errors of many kinds on damaged files
    except Exception as error:
        raise OSError(cause_of(error)) from None
    view = centre_view(image.height, image.width, max(crop.shorter, crop.side), crop.side)
    (top, left), (height, width) = view.anchor, view.size
    seen = (*view.start[::-1], *view.end[::-1])
    image = image.resize((width, height), _FILTERS.get(crop.filter, Image.Resampling.BICUBIC), seen)
    square = np.asarray(image.crop((left, top, left + crop.side, top + crop.side)))
    return torch.from_numpy(square.copy()).permute(2, 0, 1).float() / 255


def readable_images(paths: Iterable[AnyImage], crop: Crop) -> Iterator[tuple[AnyImage, torch.Tensor]]:
    """Yields (path, pixels (3, side, side) in 0 to 1) of each file; one that cannot be read is skipped with a message."""
    for path in paths:
        try:
            yield path, read_image(path, crop)
        except OSError as error:
            print(one_line(f"skipped {escape(str(path))}: {error}"), flush=True)


def true_class(path: AnyImage, folders: Sequence[str] | None, count: int = 0) -> int | None:
    """The class of an image: by the name of its folder or its label, or None if that is none of the classes.

    Args:
        path: The image.
        folders: Names of the classes.
        count: Number of classes, where a label in a source may be a number without names.
    """
    # the name of a class may have a '/', which a path would take apart
    name = path.source.classes[path.source.labels[path.index]] if isinstance(path, SourceImage) else path.parent.name
    if folders and name in folders:
        return folders.index(name)
    # other names than plain ones are looked up in their other forms
    if (
        folders
        and (not name.isascii() or escape(name) != name)
        and (place := int(positions_in([text_of(name)], folders)[0])) >= 0
    ):
        return place
    if isinstance(path, SourceImage) and are_numbers(path.source.classes) and int(name) < count:
        return int(name)
    return None
