"""Opens a source of any kind, by what its name says."""

from __future__ import annotations

import os
from pathlib import Path

from scalekd_ds.data.sources.image_folder import index_folder
from scalekd_ds.data.sources.index import reason
from scalekd_ds.data.sources.source import Source
from scalekd_ds.errors import UserError


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
