"""The interface of a source of images, and functions that check sources and take parts of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from scalekd_ds.errors import UserError
from scalekd_ds.names import escape


class Source(Protocol):
    """Encoded images with labels. Threads may share one object."""

    # properties, since the sources are frozen
    @property
    def root(self) -> Path:
        """Where the images are, for messages."""

    @property
    def labels(self) -> np.ndarray:
        """(n,) int64 positions in `classes`."""

    @property
    def classes(self) -> list[str]:
        """Names of the classes."""

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


def with_classes(source: Source, positions: np.ndarray, classes: Sequence[str]) -> Source:
    """The source with its labels as positions in another list of classes.

    Args:
        source: The images.
        positions: (classes of the source,) int64 position of each in `classes`.
        classes: Names of the classes.
    """
    # every source is a dataclass, which a protocol cannot say
    copied: Any = source
    return replace(copied, labels=positions[source.labels], classes=list(classes))


def check_all_present(source: Source, key: str, flag: str) -> None:
    """Refuses a source without any image of some classes.

    Args:
        source: The images.
        key: Setting that names the source, for the message.
        flag: What allows such a source, for the message.

    Raises:
        UserError: A class has no image.
    """
    lacking = np.flatnonzero(np.bincount(source.labels, minlength=len(source.classes)) == 0)
    if len(lacking):
        raise UserError(
            f"{key}: {escape(source.root)} has no image of {len(lacking)} of the {len(source.classes)} classes, the first "
            f"{source.classes[lacking[0]]!r}: add some, or give {flag} where that is meant."
        )


def subset(source: Source, count: int, seed: int) -> Source:
    """`count` images drawn without replacement, in the index's order; a pure function of the seed.

    Raises:
        UserError: The source has fewer images.
    """
    if count > len(source):
        raise UserError(f"data.train_images is {count}: {escape(source.root)} has {len(source)} images.")
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
                f"data.images_per_class is {count}: class {name!r} of {escape(source.root)} has {len(members)} images."
            )
        chosen.append(rng.permutation(members)[:count])
    return source.select(np.sort(np.concatenate(chosen)))
