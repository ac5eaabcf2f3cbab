"""Reads the samples of training batches, with another image of the class in the place of a bad one."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import numpy as np

from scalekd_ds.data.bad_files import BadFiles
from scalekd_ds.data.reader import BadImageError, Reader


@dataclass(frozen=True)
class Sample:
    """An image as it is read.

    Attributes:
        index: Its index in the source.
        data: Its encoded bytes, (bytes,) uint8.
        size: (height, width) in pixels, where a crop needs it.
    """

    index: int
    data: np.ndarray
    size: tuple[int, int] | None


@dataclass(frozen=True)
class BadSample:
    """An image that cannot be read.

    Attributes:
        index: Its index in the source.
        reason: What is wrong, completing the sentence "FILE ...".
    """

    index: int
    reason: str


class SampleReader:
    """Reads samples, and records those that are bad. Threads may share one object.

    Args:
        reader: Reads the images.
        bad_files: The bad files so far.
        sizes: Whether to read the size of each image.
    """

    def __init__(self, reader: Reader, bad_files: BadFiles, sizes: bool) -> None:
        self._reader, self._bad_files, self._sizes = reader, bad_files, sizes

    def read(self, index: int) -> Sample | None:
        """One image, or None where it is bad.

        Raises:
            UserError: Too many files are bad.
        """
        if index in self._bad_files:
            return None
        try:
            data = self._reader.encoded(index)
            return Sample(index, data, self._reader.size(index, data) if self._sizes else None)
        except BadImageError as error:
            self._bad_files.add(index, error.reason)
            return None

    def read_or_replace(self, index: int, view: int) -> Sample:
        """One image, or the one that replaces it in view `view`.

        Raises:
            UserError: Too many files are bad, or all of a class.
        """
        original = index
        while (sample := self.read(index)) is None:
            index = self._bad_files.replacement(original, view)
        return sample

    def read_recorded(self, index: int, view: int, bad: Container[int]) -> Sample | BadSample:
        """One image, or the one that replaced it in view `view` when the files `bad` were the bad ones.

        Raises:
            UserError: Too many files are bad.
        """
        recorded = self._bad_files.replacement(index, view, bad) if index in bad else index
        return self.read(recorded) or BadSample(recorded, self._bad_files.reasons[recorded])
