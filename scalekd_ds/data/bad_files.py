"""Keeps track of training files that cannot be read or decoded, and replaces each by another file of its class."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Container, Mapping
from types import MappingProxyType

import numpy as np

from scalekd_ds.data import augment
from scalekd_ds.data.sources.source import Source
from scalekd_ds.errors import UserError
from scalekd_ds.names import escape, one_line

# keeps these draws apart from others that are made with the same seed
_STREAM = 7
# files that the final error message names
_MAX_NAMED = 20


def most_bad(max_share: float, count: int) -> int:
    """How many of `count` images may be bad: the share, rounded up. A single bad image ends no run, unless the share is 0."""
    return math.ceil(max_share * count - 1e-9)


class BadFiles:
    """The bad files that one rank has met. Threads may share one object.

    Which file replaces a bad one is a pure function of (seed, view, file) and of the set of bad files, so a resumed
    run draws the same replacements.

    Args:
        source: The training images.
        seed: Seed of the views.
        max_share: Largest share of all files that may be bad, rounded up to a file; the run stops above it.
        known: Index -> reason of files that were found before this run, which named and counted them: they are replaced,
            but not named again, and do not count towards the share.

    Attributes:
        reasons: Index -> reason of every bad file so far; a reason completes the sentence "FILE ...".
    """

    def __init__(
        self, source: Source, seed: int, max_share: float, known: Mapping[int, str] = MappingProxyType({})
    ) -> None:
        self.source, self.seed, self.max_share = source, seed, max_share
        self.reasons: dict[int, str] = dict(known)
        self._known = len(self.reasons)
        self._lock = threading.Lock()
        self._by_class: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.reasons)

    def __contains__(self, index: int) -> bool:
        return index in self.reasons

    def add(self, index: int, reason: str) -> None:
        """Records a bad file, and names it on stderr the first time.

        Args:
            index: Index of the file in the source.
            reason: What is wrong with it, completing the sentence "FILE ...".

        Raises:
            UserError: More than `max_share` of all files are bad.
        """
        with self._lock:
            if index in self.reasons:
                return
            self.reasons[index] = reason
            count, limit = len(self.reasons) - self._known, most_bad(self.max_share, len(self.source))
        if count <= limit:
            line = f"warning: {escape(self.source.name(index))} {reason}; another of its class takes its place"
            print(one_line(line), file=sys.stderr)
            return
        named = [
            f"{escape(self.source.name(i))} {why}" for i, why in list(self.reasons.items())[self._known :][:_MAX_NAMED]
        ]
        more = f", and {count - len(named)} more" if count > len(named) else ""
        raise UserError(
            f"{count} of {len(self.source)} training images cannot be used, more than data.max_bad_share "
            f"{self.max_share:g} allows: {'; '.join(named)}{more}. `launch/prepare_data.py verify DIR` sets them aside."
        )

    def replacement(self, index: int, epoch: int, bad: Container[int] | None = None) -> int:
        """The index of another sample of the same class that is not known to be bad, or not one of `bad`.

        Raises:
            UserError: Every sample of the class is bad.
        """
        bad = self.reasons if bad is None else bad
        if self._by_class is None:
            self._by_class = np.argsort(self.source.labels, kind="stable")
        label = self.source.labels[index]
        first, last = np.searchsorted(self.source.labels[self._by_class], [label, label + 1])
        start = augment.uniform(self.seed, np.array([epoch]), np.array([index]), _STREAM)[0]
        for step in range(last - first):
            candidate = int(self._by_class[first + (int(start * (last - first)) + step) % (last - first)])
            if candidate not in bad:
                return candidate
        raise UserError(
            f"every image of the class of {escape(self.source.name(index))} is bad: mend the images, or remove the class."
        )
