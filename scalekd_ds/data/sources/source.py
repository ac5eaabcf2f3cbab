"""The interface of a source of images, and functions that check sources and take parts of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from scalekd_ds.errors import UserError, suggest


class Source(Protocol):
    """Encoded images with labels. Threads may share one object.

    Attributes:
        root: Where the images are, for messages.
        labels: (n,) int64 positions in `classes`.
        classes: Names of the classes.
        sizes: (n, 2) int32 height and width of each image in pixels, 0 where not known.
    """

    root: Path
    labels: np.ndarray
    classes: list[str]
    sizes: np.ndarray

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """The name of an image in messages: its path, or `shard.tar:member`."""

    def read(self, i: int) -> np.ndarray:
        """The encoded bytes of one image, (bytes,) uint8.

        Raises:
            OSError: The image cannot be read.
        """

    def select(self, indices: Sequence[int] | np.ndarray) -> Source:
        """A source with only these images, in this order."""


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
        UserError: The source has fewer images.
    """
    if count > len(source):
        raise UserError(f"data.train_images is {count}: {source.root} has {len(source)} images.")
    return source.select(np.sort(np.random.Generator(np.random.Philox(seed % 2**64)).permutation(len(source))[:count]))


def per_class(source: Source, count: int, seed: int) -> Source:
    """`count` images of every class drawn without replacement, in the index's order; a pure function of the seed.

    Raises:
        UserError: A class has fewer images.
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
