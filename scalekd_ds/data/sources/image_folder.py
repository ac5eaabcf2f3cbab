"""Which images there are and how one is read: folders of classes here, and `open_source` for every kind."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from scalekd_ds.data.sources.index import Index, cached, file_size, in_parallel, reason
from scalekd_ds.errors import UserError, suggest

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# file systems keep times of modification to 2 s at worst: a folder that was this young may have changed unseen
_YOUNG_NS = 2 * 10**9


@dataclass(frozen=True)
class ImageFolder:
    """Images that are files, such as those below one folder per class.

    Attributes:
        root: The folder.
        paths: Files, sorted by class and name, or in a table's order.
        labels: (len(paths),) int64, the position of each file's class in `classes`.
        classes: Names of the classes.
        sizes: (len(paths), 2) int32 height and width, 0 where not known.
        lengths: (len(paths),) int64 bytes of each file when its size was read; a file that has another length by now
            was written anew, and its size is then no longer known.
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
        """The file's path."""
        return self.paths[i]

    def read(self, i: int) -> np.ndarray:
        """(bytes,) uint8 of one file.

        Raises:
            OSError: It cannot be read.
        """
        data = np.fromfile(self.paths[i], dtype=np.uint8)
        if len(data) != self.lengths[i]:
            self.sizes[i] = 0
        return data

    def select(self, indices: Sequence[int] | np.ndarray) -> ImageFolder:
        """These files alone, in this order."""
        chosen = np.asarray(indices, dtype=np.int64)
        paths = [self.paths[i] for i in chosen.tolist()]
        return ImageFolder(
            self.root, paths, self.labels[chosen], self.classes, self.sizes[chosen], self.lengths[chosen]
        )


def _class_folders(folder: Path, key: str) -> list[str]:
    try:
        classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except OSError as error:
        raise UserError(f"{key}: the folder {str(folder)!r} cannot be read: {reason(error)}.") from None
    if not classes:
        raise UserError(f"{key}: {str(folder)!r} has no class folders: it must hold one folder of images per class.")
    if len(classes) == 1:
        raise UserError(f"{key}: {str(folder)!r} has one class, {classes[0]!r}: a classifier needs two or more.")
    return classes


def _images(names: Sequence[str]) -> list[str]:
    return sorted(name for name in names if name.lower().endswith(EXTENSIONS))


def _walk_class(folder: Path, name: str, key: str) -> tuple[list[str], dict[str, list[int]]]:
    """Files of a class, and [mtime_ns, images] of each of its folders, all relative to `folder`."""
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
        images = _images([entry.name for entry in found if not entry.is_dir()])
        files += [os.path.join(relative, image) for image in images]
        folders[relative] = [modified, len(images)]
        waiting += sorted((os.path.join(relative, entry.name) for entry in found if entry.is_dir()), reverse=True)
    if not files:
        raise UserError(f"{key}: the class folder {str(folder / name)!r} has no images ({', '.join(EXTENSIONS)}).")
    return files, folders


def _build_folder(folder: Path, key: str) -> Index:
    classes = _class_folders(folder, key)
    built = time.time_ns()
    names: list[str] = []
    folders: dict[str, list[int]] = {}
    counts = []
    for files, stamps in in_parallel(lambda name: _walk_class(folder, name, key), classes, f"folders of {folder}", 1):
        names += files
        folders |= stamps
        counts.append(len(files))
    found = list(in_parallel(lambda name: file_size(os.path.join(folder, name)), names, f"images of {folder}"))
    sizes, lengths = np.array(found)[:, :2].astype(np.int32), np.array(found)[:, 2].astype(np.int64)
    codes = np.repeat(np.arange(len(classes)), counts)
    return Index(names, codes, classes, sizes, lengths, stamp={"kind": "folder", "built": built, "folders": folders})


def _folder_changed(folder: Path, stamp: dict) -> str | None:
    if stamp.get("kind") != "folder":
        return "it was of another kind"
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if classes != sorted(name for name in stamp["folders"] if os.sep not in name):
        return "its class folders are others"
    for name, (modified, count) in stamp["folders"].items():
        try:
            same = os.stat(folder / name).st_mtime_ns == modified
            if same and modified > stamp["built"] - _YOUNG_NS:
                same = len(_images([e.name for e in os.scandir(folder / name) if not e.is_dir()])) == count
        except OSError:
            same = False
        if not same:
            return f"{str(folder / name)!r} has changed"
    return None


def index_folder(folder: Path, key: str, classes: list[str] | None = None) -> ImageFolder:
    """Indexes an ImageFolder, or reads the index that is kept in it.

    Args:
        folder: One sub-folder per class; further folders inside a class are walked.
        key: What the user set to get here, for the message.
        classes: Of the training set; None takes the names of the folders.

    Raises:
        UserError: The folder is missing, has no class or only one, a class has no image, or is not among `classes`.
    """
    if not folder.is_dir():
        parent = folder.parent
        near = [p.name for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
        hint = suggest(folder.name, near) if parent.is_dir() else f" Not even {str(parent)!r} exists."
        raise UserError(f"{key}: the folder {str(folder)!r} does not exist.{hint}")
    # what is wrong with the class folders is said whether or not there is an index
    _class_folders(folder, key)
    index = cached(folder, key, lambda: _build_folder(folder, key), lambda stamp: _folder_changed(folder, stamp))
    labels, names = index.codes, index.raw
    if classes is not None and names != classes:
        if unknown := sorted(set(names) - set(classes)):
            raise UserError(
                f"{key}: {len(unknown)} class folders of {str(folder)!r} are not among the {len(classes)} classes of "
                f"training ({', '.join(unknown[:5])}).{suggest(unknown[0], classes)}"
            )
        labels, names = np.array([classes.index(name) for name in names])[labels], classes
    paths = [os.path.join(folder, name) for name in index.names]
    return ImageFolder(folder, paths, labels.astype(np.int64), names, index.sizes, index.lengths)
