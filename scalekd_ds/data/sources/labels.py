"""Turns labels as a source writes them, names or numbers, into positions in one list of classes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from scalekd_ds.class_names import are_numbers, positions_in
from scalekd_ds.data.sources.index import Index, reason
from scalekd_ds.errors import UserError, say
from scalekd_ds.names import escape

# more digits are no position in any list
_NUMBER = re.compile(r"-?[0-9]{1,15}(\.0*)?")
_LIST = re.compile(r"\[[-\d\s.,]*\]")

# The list of classes; or, for a source that does not say in which order they are, a function from its sorted names to
# that list; or None, which takes the sorted names.
Classes = list[str] | Callable[[list[str]], list[str] | None] | None


def listed(classes: Classes, names: Sequence[str]) -> list[str] | None:
    """The list of classes that `classes` stands for, in a source that has these names."""
    return classes(sorted(names)) if callable(classes) else classes


def encode_labels(labels: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """(codes, raw) of an `Index`; `raw` has the distinct labels in order of appearance."""
    positions: dict[str, int] = {}
    codes = np.fromiter((positions.setdefault(label, len(positions)) for label in labels), np.int64, len(labels))
    return codes, list(positions)


def is_number(label: str) -> bool:
    """Whether a label is written as a whole number, also as `3.0`: a column of numbers with a gap has such ones."""
    return _NUMBER.fullmatch(label) is not None


def are_same(label: str, other: str) -> bool:
    """Whether two labels of one image say the same: `3`, `03` and `3.0` do."""
    return label == other or (is_number(label) and is_number(other) and _integer(label) == _integer(other))


def _integer(label: str) -> int:
    return int(label.partition(".")[0])


def _flaw(label: str) -> str | None:
    """Why no class can have this label; the end of a sentence."""
    if not label:
        return "no label"
    if "\0" in label:
        return f"the label {label[:40]!r}, which is no text: write the number or the name"
    return None


def resolve_labels(
    index: Index, classes: Classes, key: str, where: str, own: bool = False
) -> tuple[np.ndarray, list[str]]:
    """Labels as positions in the list of classes.

    Where all labels are names in `classes`, each is the position of its name; where all are integers, they are
    positions already. Without `classes`, names are sorted, and integers must be 0 to K-1 with each in use, so that
    labels counted from 1 are refused; names of folders may be any integers.

    Args:
        index: Index of the source.
        classes: Names of the classes, of the training set or of a classes.txt; a function that lists them; or None.
        key: Setting that names the source, for error messages.
        where: The source, for error messages.
        own: The list is the source's own, so that numbers in the source are meant as positions in it.

    Returns:
        (n,) int64 labels and the names of the classes.

    Raises:
        UserError: A label is out of range, not among `classes`, a list or no text.
    """

    def first_image_of(raw: str) -> str:
        return index.names[int(np.flatnonzero(index.codes == index.raw.index(raw))[0])]

    folders = bool(index.stamp.get("of_folders"))
    for raw in () if folders else index.raw:
        if flaw := _flaw(raw):
            raise UserError(f"{key}: {first_image_of(raw)!r} in {where} has {flaw}.")
    if not folders and all(map(_LIST.fullmatch, index.raw)):
        raise UserError(
            f"{key}: {first_image_of(index.raw[0])!r} in {where} has the label {index.raw[0]:.40}, a list: an image has one "
            "label, a number or a name."
        )
    numbers = all(is_number(label) for label in index.raw)
    given = index.raw
    if numbers and not folders and not (isinstance(classes, list) and set(given) <= set(classes)):
        # a column of numbers with a gap in it has 3.0 for 3
        given = [label.partition(".")[0] for label in given]
    classes = listed(classes, list(dict.fromkeys(given)))
    if folders and (names := classes or given) and {*map(str, range(len(names)))} != {*names}:
        # folders of classes 1 to 102 have names, as class folders outside of a tar have
        numbers = False
    if classes is None and not numbers:
        classes = sorted(given)
    positions = positions_in(given, classes or ())
    if classes is not None and (positions >= 0).all():
        table = positions.tolist()
    elif not numbers:
        unknown = sorted(label for label, position in zip(index.raw, positions, strict=True) if position < 0)
        raise UserError(
            f"{key}: {where} has {len(unknown)} classes that the list of {len(classes or ())} classes lacks "
            f"({', '.join(map(escape, unknown[:5]))}), such as that of {first_image_of(unknown[0])!r}: they must be the "
            "training set's."
        )
    else:
        table = [_integer(label) for label in index.raw]
        count = len(classes) if classes is not None else len(set(table))
        for raw, label in zip(index.raw, table, strict=True):
            if not 0 <= label < count:
                known = f"there are {count} classes" if classes is not None else f"{count} different labels are in use"
                raise UserError(
                    f"{key}: the label {label} of {first_image_of(raw)!r} in {where} is out of range: {known}, so "
                    f"labels are 0 to {count - 1}."
                )
        if classes is not None and not own and not are_numbers(classes):
            say(f"{key}: the labels of {where} are numbers: they are positions in the classes (0 is {classes[0]!r})")
    if classes is None:
        classes = [str(label) for label in range(count)]
    return np.asarray(table, dtype=np.int64)[index.codes], classes


def labels_of(index: Index, folder: Path, classes: Classes, key: str, where: str) -> tuple[np.ndarray, list[str]]:
    """Labels of a source whose folder may hold a classes.txt, as `resolve_labels` returns them.

    The list of classes is `classes`, or else the classes.txt. Where both exist and differ, numbers are positions in the
    classes.txt, and its names are looked up in `classes`.

    Args:
        index: Index of the source.
        folder: Folder that may hold a classes.txt.
        classes: Names of the training classes; a function that lists them where there is no classes.txt; or None.
        key: Setting that names the source, for error messages.
        where: The source, for error messages.

    Raises:
        UserError: A label is out of range or not among the classes, or classes.txt cannot be read.
    """
    own = read_classes(folder, key)
    if own is None:
        return resolve_labels(index, classes, key, where)
    if classes is None or callable(classes) or own == classes:
        return resolve_labels(index, own, key, where, own=True)
    labels, _ = resolve_labels(index, own, key, where, own=True)
    positions = positions_in(own, classes)
    if unknown := sorted(own[label] for label in np.unique(labels) if positions[label] < 0):
        raise UserError(
            f"{key}: {where} has {len(unknown)} classes that the list of {len(classes or ())} classes lacks "
            f"({', '.join(map(escape, unknown[:5]))}): they must be the training set's."
        )
    return positions[labels], classes


def read_classes(folder: Path, key: str) -> list[str] | None:
    """The names in a folder's classes.txt, which has one on each line, or None where there is no such file.

    A name that cannot stand in a line is escaped there (`names.escape`), by which `positions_in` knows it.

    Raises:
        UserError: The file cannot be read, or names a class twice.
    """
    path = folder / "classes.txt"
    try:
        text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
        # not `splitlines`, which also ends a line at characters that names have
        names = [name for line in re.split("\r\n|\r|\n", text) if (name := line.strip(" \t"))]
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{key}: {str(path)!r} cannot be read: {reason(error)}.") from None
    if "\0" in text:
        raise UserError(f"{key}: {str(path)!r} cannot be read: it is no text of UTF-8.")
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise UserError(f"{key}: {str(path)!r} names the class {twice[0]!r} more than once.")
    return names
