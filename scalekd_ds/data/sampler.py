"""The order of the samples, a pure function of (seed, step, rank, world size).

The training stream is endless. With n samples in an epoch, sample g of the run is the one at place g % n in the order
of epoch g // n, and optimizer step s takes the samples from g = offset + s * global batch on. Over all ranks every sample comes
exactly once in an epoch, all batches are full, and the stream is the same on any number of ranks. A resumed run starts
at another g.
"""

from __future__ import annotations

import functools
from typing import Protocol

import numpy as np

# keeps balanced orders apart from permutations of the same seed
_BALANCED = 0xBA1A


@functools.lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of one epoch, (size,) sample indices, read-only.

    The last two are cached, for batches that span two epochs.
    """
    # modulo, because a seed may be negative; an array of uint64, because numpy converts a list with a number of 2^63 or
    # more through floats
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    order = np.random.Generator(np.random.Philox(key=key)).permutation(size)
    # the cache returns the same array again
    order.setflags(write=False)
    return order


def balanced_order(seed: int, epoch: int, labels: np.ndarray) -> np.ndarray:
    """The order of one epoch in which the counts of any two classes differ by at most one sample.

    A class with too few samples repeats them, each once before any comes again; of a class with too many, some are left
    out of this epoch.

    Args:
        seed: The run's seed.
        epoch: Number of the epoch.
        labels: (n,) class of each sample.

    Returns:
        (n,) sample indices.
    """
    key = np.array([seed % 2**64, epoch ^ (_BALANCED << 32)], dtype=np.uint64)
    rng = np.random.Generator(np.random.Philox(key=key))
    members = np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels))[:-1])
    members = [m for m in members if len(m)]
    counts = np.full(len(members), len(labels) // len(members))
    counts[rng.permutation(len(members))[: len(labels) % len(members)]] += 1
    picks = [
        np.concatenate([rng.permutation(m) for _ in range(-(-count // len(m)))])[:count]
        for m, count in zip(members, counts.tolist(), strict=True)
        if count
    ]
    return rng.permutation(np.concatenate(picks))


class Sampler(Protocol):
    """What a loader asks of an order of samples.

    Attributes:
        view_seed: Seed of the augmentations.
        micro_batch: Most samples in a batch.
        accumulation: Micro batches in an optimizer step on this rank.
    """

    view_seed: int
    micro_batch: int
    accumulation: int

    def indices(self, step: int, micro: int) -> tuple[np.ndarray, np.ndarray]:
        """(B,) int64 samples of a micro batch, and (B,) int64 views to draw their augmentations of."""


class StreamSampler:
    """The part of the training stream that one rank gets.

    Args:
        size: Samples in an epoch.
        seed: The run's seed.
        global_batch: Samples in an optimizer step over all ranks.
        micro_batch: Samples in one forward pass on one rank.
        rank: This rank.
        world_size: Number of ranks.
        repeats: How often each sample comes in a row, each time with other augmentations (repeated augmentation, Hoffer
            et al. 2020), at neighbouring places of a global batch. An epoch then has `size / repeats` distinct samples.
        labels: (size,) classes, for `balanced_order`; None takes each sample once.
        offset: Samples by which the stream is ahead of `step * global_batch`: a run whose global batch has changed has seen
            as many more, or fewer.
        views: Views of a sample, which come again after as many passes; None has a new one in every pass.
        view_seed: Seed of the augmentations; None takes `seed`.

    Attributes:
        accumulation: Micro batches in an optimizer step on one rank.
        view_seed: Seed of the augmentations.

    Raises:
        ValueError: The global batch is not a multiple of the micro batch times the number of ranks.
    """

    def __init__(
        self,
        size: int,
        seed: int,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        repeats: int = 1,
        labels: np.ndarray | None = None,
        offset: int = 0,
        views: int | None = None,
        view_seed: int | None = None,
    ) -> None:
        if global_batch % (micro_batch * world_size):
            raise ValueError(f"global batch {global_batch} is no multiple of {micro_batch} x {world_size} ranks.")
        self.size, self.seed = size, seed
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.rank, self.world_size = rank, world_size
        self.accumulation = global_batch // (micro_batch * world_size)
        self.repeats, self.offset = repeats, offset
        self.views, self.view_seed = views, seed if view_seed is None else view_seed
        order = functools.partial(permutation, seed, size=size)
        # an order costs a sort, so the two that a batch across epochs needs are cached
        self._order = (
            order if labels is None else functools.lru_cache(2)(lambda epoch: balanced_order(seed, epoch, labels))
        )

    def indices(self, step: int, micro: int) -> tuple[np.ndarray, np.ndarray]:
        """The samples of micro batch `micro` of optimizer step `step` on this rank.

        Returns:
            (micro_batch,) sample indices, and (micro_batch,) views of them, the numbers to draw their augmentations with: the
            epoch, or with repeats `epoch * repeats + repeat`; with `views` modulo these.
        """
        first = self.offset + step * self.global_batch + (micro * self.world_size + self.rank) * self.micro_batch
        distinct, passes = np.divmod(np.arange(first, first + self.micro_batch), self.repeats)
        epochs, places = np.divmod(distinct, self.size)
        chosen = np.empty(self.micro_batch, dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            chosen[here] = self._order(epoch=int(epoch))[places[here]]
        drawn = epochs * self.repeats + passes
        return chosen, drawn if self.views is None else drawn % self.views


def eval_shard(size: int, rank: int, world_size: int, batch_size: int) -> list[np.ndarray]:
    """The validation batches of one rank, as a list of index arrays; index -1 is filler.

    Over all ranks each sample comes once. Every rank gets the same number of batches of the same sizes, because ZeRO-3
    communicates in every forward pass.
    """
    per_rank = -(-size // world_size)
    mine = np.arange(rank, per_rank * world_size, world_size)
    mine[mine >= size] = -1
    return [mine[i : i + batch_size] for i in range(0, per_rank, batch_size)]
