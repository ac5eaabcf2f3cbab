"""Order as data: every sample once an epoch, the same stream on any number of ranks."""

import tracemalloc

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
def test_every_sample_comes_exactly_once_an_epoch(world_size, micro, accumulation):
    size = 50
    steps = 25  # 300 samples: six epochs of 50, with batches of 12 that straddle them
    taken = stream(size, world_size, micro, accumulation, steps)
    indices, epochs = (np.concatenate([t[i] for t in taken]) for i in (0, 1))
    for epoch in range(6):
        assert sorted(indices[epochs == epoch]) == list(range(size))
    assert (epochs < 6).all()


def test_steps_are_the_same_on_any_number_of_ranks():
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
def test_evaluation_shards_hold_each_image_once_in_equal_batches(size, world_size, batch):
    shards = [eval_shard(size, rank, world_size, batch) for rank in range(world_size)]
    assert len({tuple(len(b) for b in shard) for shard in shards}) == 1, "ranks need equal batches"
    seen = np.concatenate([np.concatenate(shard) for shard in shards])
    assert sorted(seen[seen >= 0]) == list(range(size))
    assert (seen < 0).sum() < world_size


def test_a_batch_that_ranks_cannot_share_is_refused():
    with pytest.raises(ValueError, match="global batch 10 is no multiple of 4 x 2 ranks"):
        StreamSampler(50, 0, 10, 4, 0, 2)


@pytest.mark.parametrize("repeats", [2, 3])
def test_repeated_augmentation_gives_neighbours_the_same_image_in_other_rounds(repeats):
    size, batch, world = 20, 12, 2
    ranks = [StreamSampler(size, 5, batch, 6, rank, world, repeats=repeats) for rank in range(world)]
    steps = [[s.indices(step, 0) for s in ranks] for step in range(10)]
    indices = np.concatenate([i for step in steps for i, _ in step]).reshape(-1, repeats)
    rounds = np.concatenate([r for step in steps for _, r in step]).reshape(-1, repeats)
    assert (indices == indices[:, :1]).all()
    # no augmentation is drawn twice for an image
    assert len(set(zip(indices.ravel().tolist(), rounds.ravel().tolist(), strict=True))) == indices.size
    epoch = indices[:size, 0]
    assert sorted(epoch.tolist()) == list(range(size))


def test_balanced_order_has_every_class_equally_often():
    labels = np.repeat([0, 1, 2], [70, 20, 10])
    sampler = StreamSampler(100, 1, 100, 100, 0, 1, labels=labels)
    for epoch in range(3):
        chosen, rounds = sampler.indices(epoch, 0)
        counts = np.bincount(labels[chosen])
        assert sorted(counts.tolist()) == [33, 33, 34] and set(rounds) == {epoch}
        # every image of a small class before any comes again
        for label, size in ((1, 20), (2, 10)):
            times = np.bincount(chosen[labels[chosen] == label], minlength=100)[labels == label]
            assert times.min() >= counts[label] // size and times.max() <= -(-counts[label] // size)
    assert not np.array_equal(sampler.indices(0, 0)[0], sampler.indices(1, 0)[0])
    assert np.array_equal(
        sampler.indices(1, 0)[0], StreamSampler(100, 1, 100, 100, 0, 1, labels=labels).indices(1, 0)[0]
    )


@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 3), (1, 6)])
def test_another_world_size_goes_on_with_what_was_not_seen(before, after):
    size, batch = 60, 12
    seen = []
    for world, steps in ((before, range(3)), (after, range(3, 5))):
        ranks = [StreamSampler(size, 7, batch, batch // world, rank, world) for rank in range(world)]
        seen += [i for step in steps for s in ranks for i in s.indices(step, 0)[0].tolist()]
    assert sorted(seen) == list(range(size))


def test_an_epoch_of_imagenet_over_512_ranks_holds_one_permutation():
    size, world = 1_281_167, 512
    tracemalloc.start()
    sampler = StreamSampler(size, 11, 4096, 8, 100, world)
    count = sum(len(sampler.indices(step, 0)[0]) for step in range(size // 4096))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == size // 4096 * 8
    # one permutation of the epoch and little else
    assert peak < 100e6
