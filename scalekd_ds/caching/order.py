"""Which rank makes which shards of a cache, batch by batch, and the order of their images for the loader."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from scalekd_ds.data.sampler import permutation
from scalekd_ds.teacher_cache.manifest import Manifest
from scalekd_ds.teacher_cache.shards import shard_path


class Batch(NamedTuple):
    """A batch of a shard.

    Attributes:
        view: Number of the view.
        shard: Number of the shard in its view.
        first: Place of the first entry in the shard.
        entries: Number of its entries.
    """

    view: int
    shard: int
    first: int
    entries: int


def unfinished_shards(folder: Path, manifest: Manifest) -> list[tuple[int, int]]:
    """(view, shard) of all shards that are not there, view by view."""
    every = [(view, shard) for view in range(manifest.views) for shard in range(manifest.shards_of_a_view)]
    return [each for each in every if not shard_path(folder, *each).exists()]


def batches_of(manifest: Manifest, view: int, shard: int, done: int) -> list[Batch]:
    """The batches of a shard of which `done` entries are there.

    They are cut from the shard's first entry on, whoever makes them, because the last bits of an answer may depend on the
    batch that an image is in.
    """
    count = manifest.entries_of(shard)
    return [
        Batch(view, shard, first, min(manifest.batch, count - first)) for first in range(done, count, manifest.batch)
    ]


class CacheSampler:
    """Gives a loader the samples of batches of a cache, in the place of a `StreamSampler`.

    Args:
        manifest: What the cache is of.
        batches: The batches of this rank, in their order.
    """

    accumulation = 1

    def __init__(self, manifest: Manifest, batches: list[Batch]) -> None:
        self.manifest, self.batches = manifest, batches
        self.micro_batch = manifest.batch
        self.view_seed = manifest.view_seed

    def indices(self, step: int, micro: int) -> tuple[np.ndarray, np.ndarray]:
        """(B,) sample indices and (B,) view numbers of batch `step`; `micro` is 0."""
        batch = self.batches[step]
        order = permutation(self.manifest.order_seed, batch.view, self.manifest.samples)
        first = batch.shard * self.manifest.shard_entries + batch.first
        chosen = order[first : first + batch.entries]
        return chosen.copy(), np.full(len(chosen), batch.view, dtype=np.int64)
