"""Folders of images: one sub-folder for each class."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from scalekd_ds.class_names import positions_in
from scalekd_ds.data.sources.index import Index, cached_index, image_file_size, parallel_map, reason
from scalekd_ds.data.sources.labels import Classes, listed, read_classes
from scalekd_ds.errors import UserError, say, suggest

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# the coarsest resolution at which file systems keep modification times: a folder that changed so shortly before it was
# indexed may have changed again under the same time
_MTIME_RESOLUTION_NS = 2 * 10**9


@dataclass(frozen=True)
class ImageFolder:
    """Images that are files, such as those below one folder per class; a `Source`.

    Attributes:
        root: The folder that holds all files.
        paths: Path of each file, sorted by class and name, or in the order of a table.
        labels: (n,) int64 positions in `classes`.
        classes: Names of the classes.
        sizes: (n, 2) int32 height and width in pixels, 0 where not known.
        lengths: (n,) int64 bytes of each file when its size was read. A file of another length was written again since,
            and its size is then reset to 0.
    """

    root: Path
    paths: list[str]
    labels: np.ndarray
    classes: list[str]
    sizes: np.ndarray = field(default=None)
    lengths: np.ndarray = field(default=None)

    def __post_init__(self) -> None:
        if self.sizes is None or self.lengths is None:
            object.__setattr__(self, "sizes", np.zeros((len(self.paths), 2), dtype=np.int32))
            object.__setattr__(self, "lengths", np.zeros(len(self.paths), dtype=np.int64))

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, i: int) -> str:
        """The path of a file, which names it in messages."""
        return self.paths[i]

    def read(self, i: int) -> np.ndarray:
        """The encoded bytes of one image, (bytes,) uint8.

        Raises:
            OSError: The file cannot be read.
        """
        data = np.fromfile(self.paths[i], dtype=np.uint8)
        if len(data) != self.lengths[i]:
            self.sizes[i] = 0
        return data

    def select(self, indices: Sequence[int] | np.ndarray) -> ImageFolder:
        """A source with only these images, in this order."""
        chosen = np.asarray(indices, dtype=np.int64)
        return replace(
            self,
            paths=[self.paths[i] for i in chosen.tolist()],
            labels=self.labels[chosen],
            sizes=self.sizes[chosen],
            lengths=self.lengths[chosen],
        )


def index_folder(folder: Path, key: str, classes: Classes = None) -> ImageFolder:
    """Opens a folder of class folders; its index is built, or read where an earlier run kept it.

    Args:
        folder: One sub-folder per class; further folders inside a class are walked.
        key: Setting that names the source, for error messages.
        classes: Names of the training classes, or a function that lists them; None takes the sorted names of the folders.

    Raises:
        UserError: The folder is missing, has fewer than two classes, or has a class without images or not in `classes`.
    """
    if not folder.is_dir():
        parent = folder.parent
        near = [p.name for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
        hint = suggest(folder.name, near) if parent.is_dir() else f" Not even {str(parent)!r} exists."
        raise UserError(f"{key}: the folder {str(folder)!r} does not exist.{hint}")
    # checked here, so that the error is the same whether or not there is an index
    found = _class_folders(folder, key)
    index = cached_index(folder, key, lambda: _build_index(folder, key), lambda stamp: _what_changed(folder, stamp))
    labels, names = index.codes, index.raw
    classes = _order_of_file(folder, names, key) or classes if not isinstance(classes, list) else classes
    classes = listed(classes, names)
    if len(classes or found) == 1:
        raise UserError(f"{key}: {str(folder)!r} has one class, {found[0]!r}: a classifier needs two or more.")
    if classes is not None and names != classes:
        positions = positions_in(names, classes)
        if unknown := [name for name, position in zip(names, positions, strict=True) if position < 0]:
            raise UserError(
                f"{key}: {len(unknown)} class folders of {str(folder)!r} are not among the {len(classes)} classes of "
                f"training ({', '.join(unknown[:5])}).{suggest(unknown[0], classes)}"
            )
        labels, names = positions[labels], classes
    paths = [os.path.join(folder, name) for name in index.names]
    return ImageFolder(folder, paths, labels.astype(np.int64), names, index.sizes, index.lengths)


def _order_of_file(folder: Path, names: list[str], key: str) -> list[str] | None:
    """The order in which the folder's classes.txt lists its classes; None where there is none, or of something else."""
    own = read_classes(folder, key)
    if own is not None and sorted(own) != names:
        unlike = next((name for name in own if name not in names), None) or next(n for n in names if n not in own)
        say(f"{key}: {str(folder / 'classes.txt')!r} is not used: it does not list the class folders ({unlike!r})")
        return None
    return own


def _class_folders(folder: Path, key: str) -> list[str]:
    """Names of the class folders, sorted; raises UserError where there is none."""
    try:
        classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except OSError as error:
        raise UserError(f"{key}: the folder {str(folder)!r} cannot be read: {reason(error)}.") from None
    if not classes:
        raise UserError(f"{key}: {str(folder)!r} has no class folders: it must hold one folder of images per class.")
    return classes


def _image_names(names: Sequence[str]) -> list[str]:
    """The names that have an image's extension, sorted."""
    return sorted(name for name in names if name.lower().endswith(EXTENSIONS))


def _walk_class(folder: Path, name: str, key: str) -> tuple[list[str], dict[str, list[int]]]:
    """The image files of a class, and [mtime_ns, number of images] of each of its folders, by relative paths."""
    files: list[str] = []
    folders: dict[str, list[int]] = {}
    waiting = [name]
    while waiting:
        relative = waiting.pop()
        try:
            modified = os.stat(folder / relative).st_mtime_ns
            with os.scandir(folder / relative) as entries:
                found = list(entries)
        except OSError as error:
            raise UserError(f"{key}: the folder {str(folder / relative)!r} cannot be read: {reason(error)}.") from None
        images = _image_names([entry.name for entry in found if not entry.is_dir()])
        files += [os.path.join(relative, image) for image in images]
        folders[relative] = [modified, len(images)]
        waiting += sorted((os.path.join(relative, entry.name) for entry in found if entry.is_dir()), reverse=True)
    if not files:
        raise UserError(f"{key}: the class folder {str(folder / name)!r} has no images ({', '.join(EXTENSIONS)}).")
    return files, folders


def _build_index(folder: Path, key: str) -> Index:
    """Walks all class folders and reads the header of every image."""
    classes = _class_folders(folder, key)
    built = time.time_ns()
    names: list[str] = []
    folders: dict[str, list[int]] = {}
    counts = []
    for files, stamps in parallel_map(lambda name: _walk_class(folder, name, key), classes, f"folders of {folder}", 1):
        names += files
        folders |= stamps
        counts.append(len(files))
    found = list(parallel_map(lambda name: image_file_size(os.path.join(folder, name)), names, f"images of {folder}"))
    sizes, lengths = np.array(found)[:, :2].astype(np.int32), np.array(found)[:, 2].astype(np.int64)
    codes = np.repeat(np.arange(len(classes)), counts)
    return Index(names, codes, classes, sizes, lengths, stamp={"kind": "folder", "built": built, "folders": folders})


def _what_changed(folder: Path, stamp: dict) -> str | None:
    """What changed in the folder since the stamp was taken, or None."""
    if stamp.get("kind") != "folder":
        return "it was of another kind"
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if classes != sorted(name for name in stamp["folders"] if os.sep not in name):
        return "its class folders are others"
    for name, (modified, count) in stamp["folders"].items():
        try:
            same = os.stat(folder / name).st_mtime_ns == modified
            if same and modified > stamp["built"] - _MTIME_RESOLUTION_NS:
                same = len(_image_names([e.name for e in os.scandir(folder / name) if not e.is_dir()])) == count
        except OSError:
            same = False
        if not same:
            return f"{str(folder / name)!r} has changed"
    return None
