"""Order as data: every sample once an epoch, the same stream on any number of ranks."""

import numpy as np
import pytest

from scalekd_ds.data import augment
from scalekd_ds.data.sampler import StreamSampler, eval_shard, permutation


def stream(size, world_size, micro, accumulation, steps, seed=0, start=0):
    """(step, sample in the global batch) -> sorted samples of each step over all ranks."""
    batch = world_size * micro * accumulation
    samplers = [StreamSampler(size, seed, batch, micro, rank, world_size) for rank in range(world_size)]
    taken = []
    for step in range(start, start + steps):
        parts = [s.indices(step, m) for s in samplers for m in range(accumulation)]
        taken.append((np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])))
    return taken


@pytest.mark.parametrize(("world_size", "micro", "accumulation"), [(1, 12, 1), (2, 6, 1), (3, 2, 2), (2, 3, 2)])
def test_every_sample_exactly_once_an_epoch(world_size, micro, accumulation):
    size = 50
    steps = 25  # 300 samples: six epochs of 50, with batches of 12 that straddle them
    taken = stream(size, world_size, micro, accumulation, steps)
    indices, epochs = (np.concatenate([t[i] for t in taken]) for i in (0, 1))
    for epoch in range(6):
        assert sorted(indices[epochs == epoch]) == list(range(size))
    assert (epochs < 6).all()


def test_the_same_steps_on_any_number_of_ranks():
    one = stream(50, 1, 12, 1, 10)
    for world_size, micro, accumulation in [(2, 6, 1), (3, 4, 1), (3, 2, 2), (1, 3, 4)]:
        other = stream(50, world_size, micro, accumulation, 10)
        for (a, _), (b, _) in zip(one, other, strict=True):
            assert sorted(a) == sorted(b)


def test_starting_anywhere_gives_the_rest_of_the_stream():
    whole = stream(50, 2, 6, 1, 20)
    rest = stream(50, 2, 6, 1, 7, start=13)
    for (a, _), (b, _) in zip(whole[13:], rest, strict=True):
        assert np.array_equal(a, b)


def test_epochs_and_seeds_differ():
    assert not np.array_equal(permutation(0, 0, 100), permutation(0, 1, 100))
    assert not np.array_equal(permutation(0, 0, 100), permutation(1, 0, 100))
    assert np.array_equal(permutation(7, 3, 100), permutation(7, 3, 100))


def test_any_whole_number_is_a_seed():
    seeds = [-2, -1, 0, 1, 2**63, 2**63 + 1]
    orders = [permutation(seed, 0, 100) for seed in seeds]
    # a tuple of draws, so that a seed that is rounded shows as an equal one
    assert len({tuple(order) for order in orders}) == len(seeds)
    index = np.arange(3)
    assert len({tuple(augment.uniform(seed, index, index, 1)) for seed in seeds}) == len(seeds)
    assert len({augment.generator(seed, 0, 0).random() for seed in seeds}) == len(seeds)


def test_an_order_that_is_kept_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        permutation(0, 0, 100)[0] = 1


@pytest.mark.parametrize(
    ("size", "world_size", "batch"), [(10, 1, 4), (10, 3, 2), (11, 2, 5), (2, 3, 4), (50_000, 7, 64)]
)
def test_evaluation_shards(size, world_size, batch):
    shards = [eval_shard(size, rank, world_size, batch) for rank in range(world_size)]
    assert len({tuple(len(b) for b in shard) for shard in shards}) == 1, "ranks need equal batches"
    seen = np.concatenate([np.concatenate(shard) for shard in shards])
    assert sorted(seen[seen >= 0]) == list(range(size))
    assert (seen < 0).sum() < world_size


def test_a_batch_that_ranks_cannot_share():
    with pytest.raises(ValueError, match="global batch 10 is no multiple of 4 x 2 ranks"):
        StreamSampler(50, 0, 10, 4, 0, 2)
