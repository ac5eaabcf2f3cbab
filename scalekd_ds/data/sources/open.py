"""Opens a source of any kind, which its name tells."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from scalekd_ds.data.sources.hugging_face import open_hub
from scalekd_ds.data.sources.image_folder import index_folder
from scalekd_ds.data.sources.index import reason
from scalekd_ds.data.sources.labels import Classes
from scalekd_ds.data.sources.source import Source
from scalekd_ds.data.sources.table import TABLES, open_table
from scalekd_ds.data.sources.tar import is_tar, open_tars
from scalekd_ds.data.sources.tfrecord import is_tfrecord, open_tfrecords
from scalekd_ds.errors import UserError
from scalekd_ds.files.mistaken import HEAD, mistaken

_SHARDS = ((is_tar, open_tars), (is_tfrecord, open_tfrecords))


def _opener_of_shards(path: Path) -> Callable[..., Source] | None:
    """The function that opens a shard, a pattern of them or a folder that holds some; None for anything else."""
    for is_shard, open_kind in _SHARDS:
        if any(map(is_shard, path.iterdir())) if path.is_dir() else is_shard(path):
            return open_kind
    return None


def is_packed(where: str | Path) -> bool:
    """Whether a source is none of files in folders: a table, shards, or a data set of Hugging Face."""
    path = Path(where)
    is_table = path.suffix.lower() in TABLES and not path.is_dir()
    return str(where).startswith("hf:") or is_table or _opener_of_shards(path) is not None


def open_source(where: str | Path, key: str, classes: Classes = None, root: Path | None = None) -> Source:
    """Opens a source of images.

    Its kind follows from `where`:

    - a folder of class folders: the image files below them;
    - a folder of *.tar, one .tar, or a pattern such as `shard-{000..012}.tar`: WebDataset;
    - a folder of *.tfrecord or `train-00000-of-01024`, one such file, or a pattern of them: TFRecord;
    - a .csv, .tsv or .parquet: a table with the columns path and label;
    - `hf:NAME_OR_FOLDER[:SPLIT]`: a data set of Hugging Face.

    Args:
        where: The source, as above.
        key: Setting that names the source, for error messages.
        classes: Names of the training classes, so that labels mean the same in validation. Else the order is that of the
            source itself, such as of a classes.txt beside the data; where it has none, a function lists the classes, or
            None sorts them.
        root: Folder to which the paths of a table are relative; None is the table's folder.

    Raises:
        UserError: There is no such source, it cannot be used, or it decides the classes and has only one.
    """
    try:
        source = _open(os.fspath(where), key, classes, root)
        if classes is None and len(source.classes) < 2:
            raise UserError(
                f"{key}: {os.fspath(where)!r} has one class, {source.classes[0]!r}: a classifier needs two or more."
            )
        return source
    except OSError as error:
        raise UserError(f"{key}: {str(error.filename or where)!r} cannot be read: {reason(error)}.") from None


def _open(text: str, key: str, classes: Classes, root: Path | None) -> Source:
    if text.startswith("hf:"):
        return open_hub(text, key, classes)
    path = Path(text)
    if path.suffix.lower() in TABLES and not path.is_dir():
        return open_table(path, key, classes, root)
    open_kind = _opener_of_shards(path)
    if open_kind is not None:
        return open_kind(path, key, classes)
    if path.is_file():
        with open(path, "rb") as file:
            head = file.read(HEAD)
        # weights are in such archives, and images in none
        if other := "is compressed (zip): unpack it" if head.startswith(b"PK\3\4") else mistaken(head, "images"):
            raise UserError(f"{key}: {text!r} {other}.")
        raise UserError(
            f"{key}: {text!r} is a file of no known kind: give a folder, a .tar, a .tfrecord, {', '.join(TABLES)}, "
            "or hf:NAME."
        )
    return index_folder(path, key, classes)
