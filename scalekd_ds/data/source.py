"""Which images there are: an ImageFolder's index."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scalekd_ds.errors import UserError, suggest

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@dataclass(frozen=True)
class ImageFolder:
    """Images below one folder per class.

    Attributes:
        root: The folder.
        paths: Files, sorted by class and name.
        labels: (len(paths),) int64, the position of each file's class in `classes`.
        classes: Names of the class folders, sorted.
    """

    root: Path
    paths: list[str]
    labels: np.ndarray
    classes: list[str]

    def __len__(self) -> int:
        return len(self.paths)


def _files_below(folder: str) -> list[str]:
    found = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        found += [os.path.join(parent, name) for name in sorted(names) if name.lower().endswith(EXTENSIONS)]
    return found


def index_folder(folder: Path, key: str) -> ImageFolder:
    """Indexes an ImageFolder.

    Args:
        folder: One sub-folder per class; further folders inside a class are walked.
        key: What the user set to get here, for the message.

    Raises:
        UserError: The folder is missing, has no class or only one, or a class has no image.
    """
    if not folder.is_dir():
        parent = folder.parent
        near = [p.name for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
        hint = suggest(folder.name, near) if parent.is_dir() else f" Not even {str(parent)!r} exists."
        raise UserError(f"{key}: the folder {str(folder)!r} does not exist.{hint}")
    try:
        classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except OSError as error:
        raise UserError(f"{key}: the folder {str(folder)!r} cannot be read: {error.strerror}.") from None
    if not classes:
        raise UserError(f"{key}: {str(folder)!r} has no class folders: it must hold one folder of images per class.")
    if len(classes) == 1:
        raise UserError(f"{key}: {str(folder)!r} has one class, {classes[0]!r}: a classifier needs two or more.")
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = _files_below(str(folder / name))
        if not files:
            raise UserError(f"{key}: the class folder {str(folder / name)!r} has no images ({', '.join(EXTENSIONS)}).")
        paths += files
        labels += [label] * len(files)
    return ImageFolder(folder, paths, np.asarray(labels, dtype=np.int64), classes)


def check_same_classes(train: ImageFolder, val: ImageFolder) -> None:
    """Raises UserError where training and validation do not have the same class folders."""
    if train.classes == val.classes:
        return
    only_train = sorted(set(train.classes) - set(val.classes))
    only_val = sorted(set(val.classes) - set(train.classes))
    parts = []
    for names, here, there in ((only_val, val, train), (only_train, train, val)):
        if names:
            parts.append(f"{len(names)} only in {here.root} ({', '.join(names[:5])}){suggest(names[0], there.classes)}")
    raise UserError(f"training and validation have different classes: {'; '.join(parts)}")


def subset(source: ImageFolder, count: int, seed: int) -> ImageFolder:
    """`count` images drawn without replacement, in the index's order; a pure function of the seed.

    Raises:
        UserError: More images than there are.
    """
    if count > len(source):
        raise UserError(f"data.train_images is {count}: {source.root} has {len(source)} images.")
    chosen = np.sort(np.random.Generator(np.random.Philox(seed % 2**64)).permutation(len(source))[:count])
    return ImageFolder(source.root, [source.paths[i] for i in chosen], source.labels[chosen], source.classes)
