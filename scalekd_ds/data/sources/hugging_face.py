"""Data sets of Hugging Face with an image column, from the Hub or from a local folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scalekd_ds.data.sources.index import Index
from scalekd_ds.data.sources.labels import encode_labels, resolve_labels
from scalekd_ds.errors import UserError, suggest

_LABEL_COLUMNS = ("label", "labels", "cls", "class", "fine_label")


@dataclass(frozen=True)
class HubSource:
    """Images of one split.

    Attributes:
        root: The name of the data set, or its folder, and the split.
        rows: The image column of a `datasets.Dataset`, not decoded.
        column: Its name.
        order: (n,) int64 row of each image.
        labels: (n,) int64 positions in `classes`.
        classes: Names.
        sizes: (n, 2) int32, all 0: a header is only known once the image is read.
    """

    root: Path
    rows: Any
    column: str
    order: np.ndarray
    labels: np.ndarray
    classes: list[str]
    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.order)

    def name(self, i: int) -> str:
        """`hf:NAME:split:row`."""
        return f"hf:{self.root}:{self.order[i]}"

    def read(self, i: int) -> np.ndarray:
        """(bytes,) uint8 of one image.

        Raises:
            OSError: The row cannot be read, or has no image.
        """
        try:
            image = self.rows[int(self.order[i])][self.column]
        # pyarrow's own errors, which are no OSError
        except Exception as error:
            raise OSError(None, f"its row cannot be read: {error}") from None
        if image is not None and image["bytes"] is not None:
            return np.frombuffer(image["bytes"], dtype=np.uint8)
        if image is None or not image["path"]:
            raise OSError(None, "its row has no image")
        return np.fromfile(image["path"], dtype=np.uint8)

    def select(self, indices: Sequence[int] | np.ndarray) -> HubSource:
        """These images alone, in this order."""
        chosen = np.asarray(indices, dtype=np.int64)
        return HubSource(
            self.root,
            self.rows,
            self.column,
            self.order[chosen],
            self.labels[chosen],
            self.classes,
            self.sizes[chosen],
        )


def open_hub(where: str, key: str, classes: list[str] | None = None) -> HubSource:
    """Opens `hf:NAME_OR_FOLDER[:SPLIT]`.

    A folder may be what `save_to_disk` wrote, or anything that `load_dataset` takes: an imagefolder, Parquet files.

    Args:
        where: As above.
        key: What the user set to get here, for messages.
        classes: Of the training set; None takes the names that the data set has for its labels, or the labels.

    Raises:
        UserError: `datasets` is not installed, there is no such data set or split, or no column of images or labels.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(f"{key}: {where!r} needs Hugging Face's datasets: `pip install datasets`.") from None
    place, split = _parse(where)
    dataset = _load(datasets, place, split, where, key)
    if isinstance(dataset, dict):
        dataset, split = _only_split(dataset, split, where, key)
    if not len(dataset):
        raise UserError(f"{key}: {where!r} has no rows.")
    features = dataset.features
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if len(images) != 1:
        raise UserError(
            f"{key}: {where!r} has {len(images)} columns of images, and must have one: {_columns(features)}."
        )
    label = next((name for name in _LABEL_COLUMNS if name in features), None)
    if label is None:
        raise UserError(
            f"{key}: {where!r} has no column of labels ({', '.join(_LABEL_COLUMNS)}): it has {_columns(features)}."
        )
    labels, classes = _labels(dataset, features[label], label, classes, where, key)
    rows = dataset.select_columns(images).cast_column(images[0], datasets.Image(decode=False))
    count = len(dataset)
    root = Path(f"{place}:{split}" if split else place)
    return HubSource(root, rows, images[0], np.arange(count), labels, classes, np.zeros((count, 2), dtype=np.int32))


def _parse(where: str) -> tuple[str, str | None]:
    place = where.removeprefix("hf:")
    if os.path.isdir(place) or ":" not in place:
        return place, None
    place, _, split = place.rpartition(":")
    return place, split


def _columns(features: dict) -> str:
    return ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())


def _load(datasets, place: str, split: str | None, where: str, key: str):
    saved = any(os.path.isfile(os.path.join(place, name)) for name in ("state.json", "dataset_dict.json"))
    try:
        if saved:
            return datasets.load_from_disk(place)
        # the splits of a folder are few files, those of the Hub may be a terabyte
        return datasets.load_dataset(place, split=None if os.path.isdir(place) else split)
    # the library raises its own, the Hub's, pyarrow's and ValueError
    except Exception as error:
        text = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{key}: {where!r} cannot be loaded: {text}") from None


def _only_split(splits: dict, split: str | None, where: str, key: str):
    if split is None and len(splits) == 1:
        split = next(iter(splits))
    if split not in splits:
        asked = f"has no split {split!r}" if split else "has several splits"
        raise UserError(
            f"{key}: {where!r} {asked}: add one of {', '.join(f':{name}' for name in splits)}."
            f"{suggest(split or '', list(splits))}"
        )
    return splits[split], split


def _labels(dataset, feature, column: str, classes: list[str] | None, where: str, key: str):
    values = dataset.with_format("arrow")[column]
    values = values.to_pylist() if hasattr(values, "to_pylist") else [value.as_py() for value in values]
    names = getattr(feature, "names", None)
    if not all(isinstance(value, int | str) for value in values):
        row = next(i for i, value in enumerate(values) if not isinstance(value, int | str))
        raise UserError(f"{key}: {where!r}, row {row}, has the label {values[row]!r}: it must be a number or a name.")
    if names is not None:
        # the Hub marks rows without a label by -1
        with contextlib.suppress(IndexError):
            if min(values) >= 0:
                values = [names[value] for value in values]
                classes = classes if classes is not None else list(names)
    codes, raw = encode_labels([str(value) for value in values])
    empty = np.zeros((len(codes), 2), dtype=np.int32)
    index = Index([f"row {row}" for row in range(len(codes))], codes, raw, empty, empty[:, 0])
    return resolve_labels(index, classes, key, repr(where))
