"""Which images there are and how one is read: folders of classes here, and `open_source` for every kind."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from scalekd_ds.data.sources.index import Index, cached, file_size, in_parallel, reason
from scalekd_ds.errors import UserError, suggest

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# file systems keep times of modification to 2 s at worst: a folder that was this young may have changed unseen
_YOUNG_NS = 2 * 10**9


class Source(Protocol):
    """Encoded images with labels. Threads may share one.

    Attributes:
        root: Where it is, for messages.
        labels: (n,) int64 positions in `classes`.
        classes: Names.
        sizes: (n, 2) int32 height and width of each image, 0 where not known.
    """

    root: Path
    labels: np.ndarray
    classes: list[str]
    sizes: np.ndarray

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """The path of an image, or `shard.tar:member`."""

    def read(self, i: int) -> np.ndarray:
        """(bytes,) uint8, the encoded image.

        Raises:
            OSError: It cannot be read.
        """

    def select(self, indices: Sequence[int] | np.ndarray) -> Source:
        """These images alone, in this order."""


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


def open_source(where: str | Path, key: str, classes: list[str] | None = None, root: Path | None = None) -> Source:
    """Images of any kind, by what `where` is.

    - a folder of class folders: the files below them;
    - a folder of *.tar, a .tar, or a pattern such as `shard-{000..012}.tar`: WebDataset;
    - likewise *.tfrecord or `train-00000-of-01024`: TFRecord;
    - a .csv, .tsv or .parquet with the columns path and label;
    - `hf:NAME_OR_FOLDER[:SPLIT]`: a data set of Hugging Face.

    Args:
        where: As above.
        key: What the user set to get here, for messages.
        classes: Of the training set, so that labels mean the same in validation; None takes them from a classes.txt
            beside the data or from the labels.
        root: What the paths of a table are relative to; None for the table's folder.

    Raises:
        UserError: There is no such source, or what it holds cannot be used.
    """
    try:
        return _open(os.fspath(where), key, classes, root)
    except OSError as error:
        raise UserError(f"{key}: {str(error.filename or where)!r} cannot be read: {reason(error)}.") from None


def _open(text: str, key: str, classes: list[str] | None, root: Path | None) -> Source:
    # each kind needs this file's names
    from scalekd_ds.data.sources.hugging_face import open_hub
    from scalekd_ds.data.sources.table import TABLES, open_table
    from scalekd_ds.data.sources.tar import is_tar, open_tars
    from scalekd_ds.data.sources.tfrecord import is_tfrecord, open_tfrecords

    if text.startswith("hf:"):
        return open_hub(text, key, classes)
    path = Path(text)
    if path.suffix.lower() in TABLES and not path.is_dir():
        return open_table(path, key, classes, root)
    for belongs, open_kind in ((is_tar, open_tars), (is_tfrecord, open_tfrecords)):
        if any(map(belongs, path.iterdir())) if path.is_dir() else belongs(path):
            return open_kind(path, key, classes)
    if path.is_file():
        raise UserError(
            f"{key}: {text!r} is a file of no known kind: give a folder, a .tar, a .tfrecord, {', '.join(TABLES)}, or hf:NAME."
        )
    return index_folder(path, key, classes)


def check_same_classes(train: Source, val: Source) -> None:
    """Raises UserError where training and validation do not have the same classes."""
    if train.classes == val.classes:
        return
    only_train = sorted(set(train.classes) - set(val.classes))
    only_val = sorted(set(val.classes) - set(train.classes))
    parts = []
    for names, here, there in ((only_val, val, train), (only_train, train, val)):
        if names:
            parts.append(f"{len(names)} only in {here.root} ({', '.join(names[:5])}){suggest(names[0], there.classes)}")
    if not parts:
        parts = [f"{train.root} and {val.root} have the same names in another order"]
    raise UserError(f"training and validation have different classes: {'; '.join(parts)}")


def subset(source: Source, count: int, seed: int) -> Source:
    """`count` images drawn without replacement, in the index's order; a pure function of the seed.

    Raises:
        UserError: More images than there are.
    """
    if count > len(source):
        raise UserError(f"data.train_images is {count}: {source.root} has {len(source)} images.")
    return source.select(np.sort(np.random.Generator(np.random.Philox(seed % 2**64)).permutation(len(source))[:count]))


def per_class(source: Source, count: int, seed: int) -> Source:
    """`count` images of every class drawn without replacement, in the index's order; a pure function of the seed.

    Raises:
        UserError: A class with fewer images.
    """
    rng = np.random.Generator(np.random.Philox(seed % 2**64))
    chosen = []
    for label, name in enumerate(source.classes):
        members = np.flatnonzero(source.labels == label)
        if len(members) < count:
            raise UserError(
                f"data.images_per_class is {count}: class {name!r} of {source.root} has {len(members)} images."
            )
        chosen.append(rng.permutation(members)[:count])
    return source.select(np.sort(np.concatenate(chosen)))
