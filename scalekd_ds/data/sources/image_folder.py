"""Folders of images: one sub-folder for each class."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scalekd_ds.class_names import positions_in
from scalekd_ds.data.sources.index import Index, cached_index, file_length, parallel_map, read_file, reason
from scalekd_ds.data.sources.labels import Classes, listed, read_classes
from scalekd_ds.data.sources.what_counts import (
    EXTENSIONS,
    HIDDEN_FILES,
    HIDDEN_FOLDERS,
    LOOPS,
    NO_FILES,
    OUTSIDE,
    add_up,
    is_image_name,
    is_left_by_systems,
    other_kind,
    say_left_out,
)
from scalekd_ds.errors import UserError, say, suggest
from scalekd_ds.names import escape, path_of, text_of

_ARCHIVES = (".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")


@dataclass(frozen=True)
class ImageFolder:
    """Images that are files, such as those below one folder per class; a `Source`.

    Attributes:
        root: The folder that holds all files.
        paths: Path of each file, sorted by class and name, or in the order of a table.
        labels: (n,) int64 positions in `classes`.
        classes: Names of the classes.
    """

    root: Path
    paths: list[str]
    labels: np.ndarray
    classes: list[str]

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
        return read_file(self.paths[i])

    def select(self, indices: Sequence[int] | np.ndarray) -> ImageFolder:
        """A source with only these images, in this order."""
        chosen = np.asarray(indices, dtype=np.int64)
        return replace(self, paths=[self.paths[i] for i in chosen.tolist()], labels=self.labels[chosen])


def index_folder(folder: Path, key: str, classes: Classes = None) -> ImageFolder:
    """Opens a folder of class folders; its index is built, or read where an earlier run kept it.

    Args:
        folder: One sub-folder per class; further folders inside a class are walked.
        key: Setting that names the source, for error messages.
        classes: Names of the training classes, or a function that lists them; None takes the sorted names of the folders.

    Raises:
        UserError: The folder is missing or has no class, or has a class without images or not in `classes`.
    """
    if not folder.is_dir():
        parent = folder.parent
        near = [p.name for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
        hint = suggest(folder.name, near) if parent.is_dir() else f" Not even {str(parent)!r} exists."
        raise UserError(f"{key}: the folder {str(folder)!r} does not exist.{hint}")
    # checked here, so that the error is the same whether or not there is an index
    _class_folders(folder, key)
    index = cached_index(
        folder, key, lambda: _build_index(folder, key), lambda stamp: _what_changed(folder, stamp, key)
    )
    say_left_out(add_up([index.stamp["left_out"], _beside_classes(folder)]), key, str(folder))
    labels, names = index.codes, index.raw
    classes = _order_of_file(folder, names, key) or classes if not isinstance(classes, list) else classes
    classes = listed(classes, names)
    if classes is not None and names != classes:
        positions = positions_in(names, classes)
        if unknown := [name for name, position in zip(names, positions, strict=True) if position < 0]:
            raise UserError(
                f"{key}: {len(unknown)} class folders of {str(folder)!r} are not among the {len(classes)} classes of "
                f"training ({', '.join(map(escape, unknown[:5]))}).{suggest(unknown[0], classes)}"
            )
        labels, names = positions[labels], classes
    paths = [os.path.join(folder, path_of(name)) for name in index.names]
    return ImageFolder(folder, paths, labels.astype(np.int64), names)


def _order_of_file(folder: Path, names: list[str], key: str) -> list[str] | None:
    """The order in which the folder's classes.txt lists its classes; None where there is none, or of something else."""
    own = read_classes(folder, key)
    if own is None:
        return None
    positions = positions_in(own, names)
    if sorted(positions) != list(range(len(names))):
        unlike = next((name for name, position in zip(own, positions, strict=True) if position < 0), None)
        unlike = next(n for i, n in enumerate(names) if i not in positions) if unlike is None else unlike
        say(f"{key}: {str(folder / 'classes.txt')!r} is not used: it does not list the class folders ({unlike!r})")
        return None
    return [names[position] for position in positions]


def _class_folders(folder: Path, key: str) -> list[str]:
    """Names of the class folders, sorted; raises UserError where there is none, or a link to one leads nowhere."""
    classes, above = [], [os.path.realpath(folder)]
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_left_by_systems(entry.name) or _leads_back(entry, above):
                    continue
                if _is_folder(entry):
                    classes.append(entry.name)
                # with an extension it is a list or an image, and no class
                elif entry.is_symlink() and not os.path.splitext(entry.name)[1] and not os.path.exists(entry.path):
                    raise UserError(
                        f"{key}: {entry.path!r} is a link to {os.readlink(entry.path)!r}, which cannot be reached: mend it, "
                        "or remove it if it is no class."
                    )
    except OSError as error:
        raise UserError(f"{key}: the folder {str(folder)!r} cannot be read: {reason(error)}.") from None
    names = os.listdir(folder)
    of_hub = any(name.endswith((".parquet", ".arrow")) for name in names) and not classes
    if of_hub or "dataset_dict.json" in names or not classes:
        cure = "it must hold one folder of images per class"
        if of_hub or "dataset_dict.json" in names:
            cure = f"a data set of Hugging Face is given as hf:{folder}"
        raise UserError(f"{key}: {str(folder)!r} has no class folders: {cure}.")
    return sorted(classes, key=text_of)


def _is_folder(entry: os.DirEntry) -> bool:
    """Whether an entry is a folder or a link to one; a link that leads back to itself is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_file(entry: os.DirEntry) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False


def _leads_back(entry: os.DirEntry, above: Sequence[str]) -> bool:
    """Whether an entry is a link to a folder that holds one of the real folders `above`: its images would come again.

    A link within a class to the folder of all data would else train on the validation images.
    """
    if not entry.is_symlink():
        return False
    target = os.path.realpath(entry.path).rstrip(os.sep) + os.sep
    return any(f"{real}{os.sep}".startswith(target) for real in above)


def _beside_classes(folder: Path) -> dict[str, int]:
    """What lies beside the class folders and is left out, by kind; files that are no images, such as lists, are not."""
    counts: Counter[str] = Counter()
    above = [os.path.realpath(folder)]
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_left_by_systems(entry.name):
                counts[HIDDEN_FOLDERS] += _is_folder(entry)
            elif _leads_back(entry, above):
                counts[LOOPS] += 1
            elif is_image_name(entry.name) and not _is_folder(entry):
                counts[OUTSIDE] += 1
            # a class that nobody has unpacked
            elif entry.name.lower().endswith(_ARCHIVES):
                counts[other_kind(entry.name)] += not _is_folder(entry)
    return dict(counts)


class _Listed(NamedTuple):
    """What a class folder holds.

    Attributes:
        files: Paths of the images, relative to the folder of the classes.
        folders: Relative path of each folder in it -> [mtime_ns, digest of the names in it].
        left_out: Number of what is left out, by kind.
    """

    files: list[str]
    folders: dict[str, list]
    left_out: dict[str, int]


def _walk_class(folder: Path, name: str, key: str) -> _Listed:
    """Lists the images of a class folder and of all folders in it, also behind links."""
    files: list[str] = []
    folders: dict[str, list] = {}
    left_out: Counter[str] = Counter()
    # each with the real folders from which a link was followed on the way to it, and its own
    waiting: list[tuple[str, tuple[str, ...]]] = [(name, (os.path.realpath(folder), os.path.realpath(folder / name)))]
    while waiting:
        relative, above = waiting.pop()
        try:
            stat = os.stat(folder / relative)
            with os.scandir(folder / relative) as entries:
                found = sorted(entries, key=lambda entry: text_of(entry.name))
        except OSError as error:
            raise UserError(f"{key}: the folder {str(folder / relative)!r} cannot be read: {reason(error)}.") from None
        inside = []
        for entry in found:
            kind = _kind_left_out(entry)
            if kind:
                left_out[kind] += 1
            elif _is_folder(entry):
                path = os.path.join(relative, entry.name)
                if not entry.is_symlink():
                    inside.append((path, (*above[:-1], os.path.join(above[-1], entry.name))))
                elif _leads_back(entry, above):
                    left_out[LOOPS] += 1
                else:
                    inside.append((path, (*above, os.path.realpath(entry.path))))
            else:
                files.append(os.path.join(relative, entry.name))
        folders[relative] = [stat.st_mtime_ns, _names_digest(entry.name for entry in found)]
        waiting += reversed(inside)
    if not files:
        cure = "add some, or remove it"
        if any(other_kind(f"_{extension}") in left_out for extension in (".parquet", ".arrow")):
            cure = f"a data set of Hugging Face is given as hf:{folder}"
        raise UserError(
            f"{key}: the class folder {str(folder / name)!r} has no images ({', '.join(EXTENSIONS)}): {cure}."
        )
    return _Listed(files, folders, dict(left_out))


def _kind_left_out(entry: os.DirEntry) -> str | None:
    """As what an entry of a class folder is left out; None for a folder to look into and for an image."""
    hidden = is_left_by_systems(entry.name)
    if _is_folder(entry):
        return HIDDEN_FOLDERS if hidden else None
    if hidden:
        return HIDDEN_FILES
    if not is_image_name(entry.name):
        return other_kind(entry.name)
    # a link to nothing is an image that is missing, as a run says; reading a pipe would wait for ever
    return None if _is_file(entry) or not os.path.exists(entry.path) else NO_FILES


def _names_digest(names: Iterable[str]) -> str:
    """A digest of the names in a folder, in whatever order and locale they are listed."""
    return hashlib.blake2b(b"\0".join(sorted(map(os.fsencode, names))), digest_size=12).hexdigest()


def _build_index(folder: Path, key: str) -> Index:
    """Walks all class folders, and asks for the length of every image, by which the doctor compares nodes."""
    classes = _class_folders(folder, key)
    names: list[str] = []
    folders: dict[str, list] = {}
    counts, left_out = [], []
    for found in parallel_map(lambda name: _walk_class(folder, name, key), classes, f"folders of {folder}", 1):
        names += found.files
        folders |= found.folders
        left_out.append(found.left_out)
        counts.append(len(found.files))
    lengths = list(parallel_map(lambda name: file_length(os.path.join(folder, name)), names, f"images of {folder}"))
    codes = np.repeat(np.arange(len(classes)), counts)
    names, classes = list(map(text_of, names)), list(map(text_of, classes))
    stamp = {"kind": "folder", "folders": folders, "left_out": add_up(left_out)}
    return Index(names, codes, classes, np.array(lengths, dtype=np.int64), stamp=stamp)


def _what_changed(folder: Path, stamp: dict, key: str) -> str | None:
    """What changed in the folder since the stamp was taken, or None.

    The names in every folder are compared, and the folders' times: data that were unpacked from an archive or an image of
    a disk may have the times of other data. A listing costs a second for ImageNet's 1,281,167 names on a local disk; a
    `stat` of each file, which this does without, would cost minutes on a network disk.
    """
    if stamp.get("kind") != "folder":
        return "it was of another kind"
    if set(_class_folders(folder, key)) != {name for name in stamp["folders"] if os.sep not in name}:
        return "its class folders are others"

    def changed(name: str) -> bool:
        modified, digest = stamp["folders"][name]
        place = folder / name
        try:
            if os.stat(place).st_mtime_ns != modified:
                return True
            with os.scandir(place) as entries:
                return _names_digest(entry.name for entry in entries) != digest
        except OSError:
            return True

    names = list(stamp["folders"])
    for name, differs in zip(names, parallel_map(changed, names, f"folders of {folder}", 16), strict=True):
        if differs:
            return f"{str(folder / name)!r} has changed"
    return None
