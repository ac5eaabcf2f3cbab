"""Order as data: which sample comes when, a pure function of (seed, step, rank, world size).

The training stream is endless: sample g of the run is permutation(seed, epoch g // n)[g % n], and optimizer step s takes
g from s * global batch on. Every sample comes exactly once an epoch over all ranks, all batches are full, and the stream
is the same on any number of ranks; resuming is starting to count elsewhere.
"""

from __future__ import annotations

import functools

import numpy as np

_BALANCED = 0xBA1A


@functools.lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """(size,) order of one epoch; two are kept, for batches that straddle epochs."""
    # modulo: a seed may be negative; as uint64: numpy takes a list with a word over 2^63 through floats
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    order = np.random.Generator(np.random.Philox(key=key)).permutation(size)
    # the cache hands out the same array again
    order.setflags(write=False)
    return order


def balanced_order(seed: int, epoch: int, labels: np.ndarray) -> np.ndarray:
    """(len(labels),) order of one epoch in which every class comes equally often, to one sample.

    Classes with fewer samples than that repeat them, all of them before any comes again; of larger classes some wait for
    another epoch.
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


class StreamSampler:
    """Indices of the training stream for one rank.

    Args:
        size: Samples in an epoch.
        seed: The run's seed.
        global_batch: Samples of an optimizer step over all ranks.
        micro_batch: Samples of one forward pass on one rank.
        rank: This rank.
        world_size: All ranks.
        repeats: Times that a sample comes in a row, each time with other augmentations (repeated augmentation, Hoffer et
            al. 2020): neighbouring places of a global batch hold them. An epoch then has `size / repeats` distinct samples.
        labels: (size,) classes, for an order in which every class comes equally often; None takes each sample once.

    Raises:
        ValueError: A global batch that micro batches and ranks do not divide.
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
    ) -> None:
        if global_batch % (micro_batch * world_size):
            raise ValueError(f"global batch {global_batch} is no multiple of {micro_batch} x {world_size} ranks.")
        self.size, self.seed = size, seed
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.rank, self.world_size = rank, world_size
        self.accumulation = global_batch // (micro_batch * world_size)
        self.repeats = repeats
        order = functools.partial(permutation, seed, size=size)
        # an epoch costs a sort: the batches that straddle two epochs need both
        self._order = (
            order if labels is None else functools.lru_cache(2)(lambda epoch: balanced_order(seed, epoch, labels))
        )

    def indices(self, step: int, micro: int) -> tuple[np.ndarray, np.ndarray]:
        """(micro_batch,) sample indices, and the round of each, of micro batch `micro` of optimizer step `step`.

        A round is what augmentations are drawn for beside the sample: the epoch, and with repeats the pass in it.
        """
        first = step * self.global_batch + (micro * self.world_size + self.rank) * self.micro_batch
        distinct, passes = np.divmod(np.arange(first, first + self.micro_batch), self.repeats)
        epochs, places = np.divmod(distinct, self.size)
        chosen = np.empty(self.micro_batch, dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            chosen[here] = self._order(epoch=int(epoch))[places[here]]
        return chosen, epochs * self.repeats + passes


def eval_shard(size: int, rank: int, world_size: int, batch_size: int) -> list[np.ndarray]:
    """Batches of indices of one rank: each sample once over all ranks, -1 as filler.

    Every rank gets the same number of batches of the same sizes, because ZeRO-3 communicates in every forward pass.
    """
    per_rank = -(-size // world_size)
    mine = np.arange(rank, per_rank * world_size, world_size)
    mine[mine >= size] = -1
    return [mine[i : i + batch_size] for i in range(0, per_rank, batch_size)]
