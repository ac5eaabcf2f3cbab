"""Tables of paths and labels: CSV, TSV or Parquet. Every path must stay below one folder."""

from __future__ import annotations

import csv
import decimal
import hashlib
import math
import os
import re
from pathlib import Path

import numpy as np

from scalekd_ds.data.sources.image_folder import ImageFolder
from scalekd_ds.data.sources.index import Index, cached_index, file_length, parallel_map, reason
from scalekd_ds.data.sources.labels import Classes, encode_labels, labels_of
from scalekd_ds.errors import UserError, suggest
from scalekd_ds.files.mistaken import HEAD, mistaken
from scalekd_ds.names import escape, is_unicode, path_of

TABLES = (".csv", ".tsv", ".parquet")
_COLUMNS = ("path", "label")
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# what a column of a Parquet may hold
_VALUES = (str, bytes, int, float, decimal.Decimal, type(None))


def open_table(table: Path, key: str, classes: Classes = None, root: Path | None = None) -> ImageFolder:
    """Opens a table with the columns `path` and `label`.

    A missing file is not an error here, because a run replaces a small share of bad files; a table of which no file
    exists is refused.

    Args:
        table: A .csv or .tsv with a line of column names, or a .parquet.
        key: Setting that names the source, for error messages.
        classes: Names of the classes; None takes them from a classes.txt beside the table, or from the labels.
        root: Folder to which the paths are relative, and which none may leave, not even by a link; None is the table's
            folder.

    Raises:
        UserError: The table is missing, empty or without a column, it names a file twice or one outside of `root`, or a
            label is out of range.
    """
    if not table.is_file():
        near = [p.name for p in table.parent.iterdir()] if table.parent.is_dir() else []
        raise UserError(f"{key}: the table {str(table)!r} does not exist.{suggest(table.name, near)}")
    folder = table.parent if root is None else Path(root)
    index = cached_index(
        table, key, lambda: _build_index(table, folder, key), lambda stamp: _what_changed(table, folder, stamp)
    )
    labels, classes = labels_of(index, table.parent, classes, key, escape(table))
    paths = [os.path.join(folder, path_of(name)) for name in index.names]
    return ImageFolder(folder, paths, labels, classes)


def _stamp(table: Path, folder: Path) -> dict:
    """The state of the table by which a stale index is recognised."""
    stat = os.stat(table)
    return {
        "kind": "table",
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        # its time may be that of another table, where an archive was unpacked
        "digest": _digest(table),
        "root": os.path.relpath(folder, table.parent),
    }


def _digest(table: Path) -> str:
    with open(table, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _what_changed(table: Path, folder: Path, stamp: dict) -> str | None:
    """What changed since the stamp was taken, or None."""
    now = _stamp(table, folder)
    if stamp.get("root") != now["root"]:
        return "its root is another"
    return None if stamp == now else "the table has changed"


def _build_index(table: Path, folder: Path, key: str) -> Index:
    stamp = _stamp(table, folder)
    try:
        with open(table, "rb") as file:
            if other := mistaken(file.read(HEAD), "a table"):
                raise UserError(f"{key}: the table {str(table)!r} {other}.")
        names, labels = (_read_parquet if table.suffix.lower() == ".parquet" else _read_delimited)(table, key)
    except OSError as error:
        raise UserError(f"{key}: the table {str(table)!r} cannot be read: {reason(error)}.") from None
    if not names:
        raise UserError(f"{key}: the table {str(table)!r} has no rows.")
    _check_rows(names, labels, table, key)
    paths = [path_of(name) for name in names]
    for row, path in enumerate(paths, 1):
        if not is_unicode(names[row - 1]) and not os.path.lexists(os.path.join(folder, path)):
            raise UserError(
                f"{key}: the table {str(table)!r} is no text of UTF-8: row {row} has {names[row - 1]!r}, and no file has "
                "these bytes as its name."
            )
    _check_links(paths, folder, table, key)
    paths = [os.path.join(folder, path) for path in paths]
    lengths = np.array(list(parallel_map(file_length, paths, f"images of {table}")), dtype=np.int64)
    if not lengths.any() and not any(map(os.path.exists, paths)):
        raise UserError(
            f"{key}: none of the {len(names)} files that {str(table)!r} names exists below {str(folder)!r}, such as "
            f"{names[0]!r:.200}."
        )
    codes, raw = encode_labels(labels)
    return Index(names, codes, raw, lengths, stamp=stamp)


def _require_columns(found: list[str], table: Path, key: str) -> None:
    for column in _COLUMNS:
        if column not in found:
            cure = "must have path and label, which its first line names"
            if table.suffix.lower() == ".parquet":
                cure = "must have path and label; a data set of Hugging Face is given as hf:FOLDER"
            # semicolons, where the comma is that of numbers
            elif other := next((c for c in ",;\t|" if len(found) == 1 and set(_COLUMNS) <= {*found[0].split(c)}), None):
                cure = f"must have path and label, with {_separator(table)!r} and not {other!r} between them"
            names = ", ".join(map(escape, found))
            raise UserError(
                f"{key}: the table {str(table)!r} has no column {column!r}: it has {names[:200] or 'none'}, and {cure}."
            )
        if found.count(column) > 1:
            raise UserError(
                f"{key}: the table {str(table)!r} has {found.count(column)} columns {column!r}: keep one of them."
            )


def _separator(table: Path) -> str:
    return "\t" if table.suffix.lower() == ".tsv" else ","


def _read_delimited(table: Path, key: str) -> tuple[list[str], list[str]]:
    """(paths, labels) of a .csv or .tsv."""
    names, labels = [], []
    try:
        # utf-8-sig, because spreadsheets write a byte order mark; and a file may have a name of any bytes
        with open(table, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            # a quote without an end would swallow all rows behind it, which `strict` refuses
            rows = csv.reader(file, delimiter=_separator(table), strict=True)
            header = [name.strip(" \t") for name in next(rows, [])]
            if not all(map(is_unicode, header)):
                raise UserError(f"{key}: the table {str(table)!r} is no text of UTF-8 in columns: {header[0][:80]!r}.")
            _require_columns(header, table, key)
            path, label = (header.index(column) for column in _COLUMNS)
            for row in rows:
                if not row:
                    continue
                if len(row) != len(header):
                    raise UserError(
                        f"{key}: {str(table)!r}, line {rows.line_num}, has {len(row)} fields: its first line has "
                        f"{len(header)}."
                    )
                names.append(row[path])
                labels.append(row[label].strip(" \t"))
                if (names[-1], labels[-1]) == _COLUMNS:
                    raise UserError(
                        f"{key}: {str(table)!r}, line {rows.line_num}, has the names of the columns again, as tables that "
                        "were joined: remove the line."
                    )
    except csv.Error as error:
        raise UserError(
            f"{key}: {str(table)!r}, line {rows.line_num}, cannot be split into columns: {error}."
        ) from None
    return names, labels


def _read_parquet(table: Path, key: str) -> tuple[list[str], list[str]]:
    """(paths, labels) of a .parquet."""
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(f"{key}: {str(table)!r} needs pyarrow: `pip install pyarrow`, or use a .csv.") from None
    try:
        # pyarrow itself opens no path that is no UTF-8
        with open(table, "rb") as source, parquet.ParquetFile(source) as file:
            found = file.schema_arrow.names
            # of two columns of one name pyarrow would read both
            read = file.read(columns=[column for column in _COLUMNS if found.count(column) == 1])
        columns = {column: values.to_pylist() for column, values in zip(read.column_names, read.columns, strict=True)}
    # a damaged file raises any of these, and the file system OSError
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{key}: the table {str(table)!r} cannot be read as Parquet: {reason(error)}.") from None
    _require_columns(found, table, key)
    for column in _COLUMNS:
        for row, value in enumerate(columns[column], 1):
            if not isinstance(value, _VALUES):
                kind = "a path" if column == "path" else "a number or a name"
                raise UserError(
                    f"{key}: {str(table)!r}, row {row}, has the {column} {value!r:.60}: it must be {kind}; a data set of "
                    "Hugging Face is given as hf:FOLDER."
                )
    paths, labels = (list(map(_text, columns[column])) for column in _COLUMNS)
    return paths, labels


def _text(value: object) -> str:
    """A value of a Parquet, whose columns of bytes can have names that are no UTF-8; empty where there is none."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    # a column of numbers of which some are missing
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    return "" if missing else str(value)


def _check_rows(names: list[str], labels: list[str], table: Path, key: str) -> None:
    """Raises UserError for the first row whose path or label cannot be used."""
    seen: set[str] = set()
    for row, (name, label) in enumerate(zip(names, labels, strict=True), 1):
        problem = None
        if not name or "\0" in name:
            problem = f"has the path {name!r:.80}"
        elif _ADDRESS.match(name):
            problem = f"has {name!r:.200}, an address: fetch the images, and name them by their paths"
        elif not label:
            problem = f"has no label for {name!r}"
        elif label.lower() in ("nan", "<na>"):
            problem = f"has the label {label!r} for {name!r}, as programs write one that is missing: give it a name or a number"
        elif os.path.isabs(name) or ".." in name.split("/"):
            problem = f"has {name!r}: paths must stay below the table's root, without '..'"
        elif (plain := os.path.normpath(name)) in seen:
            problem = f"names {name!r} again: each image may be named once"
        else:
            seen.add(plain)
        if problem:
            raise UserError(f"{key}: {str(table)!r}, row {row}, {problem}.")


def _check_links(names: list[str], folder: Path, table: Path, key: str) -> None:
    """Raises UserError for a path that leaves the root by a link; each folder is resolved only once."""
    real = os.path.realpath(folder)

    def outside(path: str) -> bool:
        target = os.path.realpath(path)
        return target != real and not target.startswith(real.rstrip(os.sep) + os.sep)

    parents = {parent: outside(os.path.join(folder, parent)) for parent in {os.path.dirname(name) for name in names}}

    def escapes(name: str) -> bool:
        path = os.path.join(folder, name)
        return parents[os.path.dirname(name)] or (os.path.islink(path) and outside(path))

    for name, escaped in zip(names, parallel_map(escapes, names, f"paths of {table}"), strict=True):
        if escaped:
            raise UserError(f"{key}: {str(table)!r} has {name!r}, a link that leads out of {str(folder)!r}: refused.")
