"""What a loader asks of a cache of a teacher's targets, which has an entry for each view of each sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch


class CachedTargets(Protocol):
    """Targets by sample and view. The threads of a loader share one object, and call it at the same time."""

    @property
    def bad(self) -> Mapping[int, str]:
        """Index -> reason of the files that were bad when the cache was written, all of them and no others.

        They have no entry, and as partners of mixed images they were replaced there. It does not change.
        """

    def take(self, indices: np.ndarray, views: np.ndarray) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
        """Reads the targets of a batch. A view whose entry is damaged or marked is replaced by another of its sample.

        Args:
            indices: (B,) int64 samples, none of them in `bad`.
            views: (B,) int64 views of them.

        Returns:
            (B,) int64 the views whose targets these are, and the targets by name: tensors on the host of B rows each.

        Raises:
            UserError: No view of a sample can be had.
        """

    def mark(self, index: int, view: int, reason: str) -> None:
        """Says that a view cannot be made again, since its partner cannot be read any more: `take` avoids it from here on.

        Threads that have taken the same view each say so.

        Args:
            index: The sample.
            view: The view of it.
            reason: A sentence about the partner: its name and what is wrong.
        """
