"""Image data sets of Hugging Face, from the Hub or from a local folder."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from scalekd_ds.class_names import are_numbers
from scalekd_ds.data.sources.index import Index, read_file
from scalekd_ds.data.sources.labels import Classes, encode_labels, resolve_labels
from scalekd_ds.errors import UserError, say, suggest
from scalekd_ds.names import is_unicode, text_of, utf8_path

# the first one that a data set has holds its labels
_LABEL_COLUMNS = ("label", "labels", "cls", "class", "fine_label")
# of folders whose paths are no UTF-8, which the library opens none of
_ALIASES = contextlib.ExitStack()


@dataclass(frozen=True)
class HubSource:
    """The images of one split of a data set; a `Source`.

    Attributes:
        root: Name or folder of the data set, and the split.
        rows: The image column of a `datasets.Dataset`, not decoded.
        column: Name of that column.
        order: (n,) int64 row of each image.
        labels: (n,) int64 positions in `classes`.
        classes: Names of the classes.
    """

    root: Path
    rows: Any
    column: str
    order: np.ndarray
    labels: np.ndarray
    classes: list[str]

    def __len__(self) -> int:
        return len(self.order)

    def name(self, i: int) -> str:
        """The name of an image in messages, `hf:NAME:split:row`."""
        return f"hf:{self.root}:{self.order[i]}"

    def read(self, i: int) -> np.ndarray:
        """The encoded bytes of one image, (bytes,) uint8.

        Raises:
            OSError: The row cannot be read, or has no image.
        """
        try:
            image = self.rows[int(self.order[i])][self.column]
        # pyarrow raises errors of its own, which are no OSError
        except Exception as error:
            raise OSError(None, f"its row cannot be read: {error}") from None
        if image is not None and image["bytes"] is not None:
            return np.frombuffer(image["bytes"], dtype=np.uint8)
        if image is None or not image["path"]:
            raise OSError(None, "its row has no image")
        if "://" in image["path"] and not os.path.exists(image["path"]):
            raise OSError(
                None, f"its image is at {image['path']}, and a run fetches none: save the images with the rows"
            )
        return read_file(image["path"])

    def select(self, indices: Sequence[int] | np.ndarray) -> HubSource:
        """A source with only these images, in this order."""
        chosen = np.asarray(indices, dtype=np.int64)
        return replace(self, order=self.order[chosen], labels=self.labels[chosen])


def open_hub(where: str, key: str, classes: Classes = None) -> HubSource:
    """Opens `hf:NAME_OR_FOLDER[:SPLIT]`.

    A folder may be what `save_to_disk` wrote, or anything that `load_dataset` takes: an imagefolder, Parquet files.

    Args:
        where: The data set, as above.
        key: Setting that names the source, for error messages.
        classes: Names of the training classes; None takes the names that the data set has for its labels, or the
            labels.

    Raises:
        UserError: `datasets` is not installed, there is no such data set or split, or it has not one column of images
            and one of labels.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(f"{key}: {where!r} needs Hugging Face's datasets: `pip install datasets`.") from None
    name, split = _split_name(where)
    if not name:
        raise UserError(f"{key}: {where!r} names no data set: give hf:NAME, or hf:FOLDER.")
    if os.path.isfile(name):
        raise UserError(f"{key}: {name!r} is a file: a data set of Hugging Face is given as hf:FOLDER.")
    dataset = _load(datasets, name, split, where, key)
    if isinstance(dataset, dict):
        dataset, split = _select_split(dataset, split, where, key)
    if not len(dataset):
        raise UserError(f"{key}: {where!r} has no rows.")
    features = dataset.features
    images = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    if len(images) != 1:
        raise UserError(
            f"{key}: {where!r} has {len(images)} columns of images, and must have one: {_columns(features)}."
        )
    if (mode := features[images[0]].mode) not in (None, "RGB", "RGBA", "CMYK"):
        raise UserError(
            f"{key}: {where!r} wants its images as {mode}, and they are read as RGB: cast the column {images[0]!r} to Image()."
        )
    label = next((column for column in _LABEL_COLUMNS if column in features), None)
    if label is None:
        raise UserError(
            f"{key}: {where!r} has no column of labels ({', '.join(_LABEL_COLUMNS)}): it has {_columns(features)}. "
            "Rename the one that is meant to 'label'."
        )
    if others := [column for column in _LABEL_COLUMNS if column in features and column != label]:
        say(f"{key}: the labels of {where!r} are those of its column {label!r}, not of {', '.join(map(repr, others))}")
    labels, classes = _resolve_labels(dataset, features[label], label, classes, where, key)
    rows = dataset.select_columns(images).cast_column(images[0], datasets.Image(decode=False))
    count = len(dataset)
    root = Path(f"{name}:{split}" if split else name)
    return HubSource(root, rows, images[0], np.arange(count), labels, classes)


def _split_name(where: str) -> tuple[str, str | None]:
    """The name or folder of a data set, and the split where `where` names one."""
    name = where.removeprefix("hf:")
    if os.path.isdir(name) or ":" not in name:
        return name, None
    # a split may be a part, `train[:10%]`
    if named := re.fullmatch(r"(.+?):([^:/\[\]]+(\[[^\[\]]*\])?)", name, re.DOTALL):
        return named[1], named[2]
    name, _, split = name.rpartition(":")
    return name, split


def _columns(features: dict) -> str:
    return ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())


def _load(datasets: Any, name: str, split: str | None, where: str, key: str) -> Any:
    """The data set, or a dictionary of its splits."""
    if os.path.isdir(name):
        # for as long as the process reads images
        name = _ALIASES.enter_context(utf8_path(name))
    saved = any(os.path.isfile(os.path.join(name, file)) for file in ("state.json", "dataset_dict.json"))
    try:
        if saved:
            return datasets.load_from_disk(name)
        # a folder is loaded with all its splits; those on the Hub may be a terabyte
        return datasets.load_dataset(name, split=None if os.path.isdir(name) else split)
    # the library raises errors of its own, of the Hub and of pyarrow, and ValueError
    except Exception as error:
        # a set without rows is saved without a file of them
        if saved and isinstance(error, IndexError):
            raise UserError(f"{key}: {where!r} has no rows.") from None
        text = " ".join(str(error).split())[:300] or type(error).__name__
        if not is_unicode(text_of(where)):
            text += ". The library wants names of UTF-8: rename the folder"
        raise UserError(f"{key}: {where!r} cannot be loaded: {text}") from None


def _select_split(splits: dict[str, Any], split: str | None, where: str, key: str) -> tuple[Any, str]:
    """The split that the user named, or the only one there is, and its name."""
    if split is None and len(splits) == 1:
        split = next(iter(splits))
    if split not in splits:
        problem = f"has no split {split!r}" if split else "has several splits"
        raise UserError(
            f"{key}: {where!r} {problem}: add one of {', '.join(f':{name}' for name in splits)}."
            f"{suggest(split or '', list(splits))}"
        )
    return splits[split], split


def _resolve_labels(
    dataset: Any, feature: Any, column: str, classes: Classes, where: str, key: str
) -> tuple[np.ndarray, list[str]]:
    """(labels, classes) of the data set, as `resolve_labels` gives them."""
    values = dataset.with_format("arrow")[column]
    values = values.to_pylist() if hasattr(values, "to_pylist") else [value.as_py() for value in values]
    names = getattr(feature, "names", None)

    def is_label(value: object) -> bool:
        return isinstance(value, int | str) or (isinstance(value, float) and value.is_integer())

    if not all(map(is_label, values)):
        row = next(i for i, value in enumerate(values) if not is_label(value))
        raise UserError(f"{key}: {where!r}, row {row}, has the label {values[row]!r}: it must be a number or a name.")
    if names is not None and -1 in values:
        raise UserError(
            f"{key}: {where!r}, row {values.index(-1)}, has the label -1, as a split without labels has: give another one."
        )
    if names is not None and isinstance(classes, list) and are_numbers(classes) and set(names) != set(classes):
        # the training set's labels are numbers without names, which these positions are too
        names = None
    if names is not None:
        # labels that are no positions stay numbers, which resolve_labels refuses
        with contextlib.suppress(IndexError):
            if min(values) >= 0:
                values = [names[value] for value in values]
                # these names have an order of their own
                classes = list(names) if classes is None or callable(classes) else classes
    codes, raw = encode_labels([str(value) for value in values])
    index = Index([f"row {row}" for row in range(len(codes))], codes, raw, np.zeros(len(codes), dtype=np.int64))
    return resolve_labels(index, classes, key, repr(where))
