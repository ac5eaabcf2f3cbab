"""Entries are found wherever they are, damaged ones are named and replaced, and memory does not grow with the images."""

import json
import threading

import numpy as np
import pytest
import torch
from written_caches import answers, manifest_of, write_cache

from scalekd_ds.errors import UserError
from scalekd_ds.teacher_cache.manifest import LAST_STAGE, NAME
from scalekd_ds.teacher_cache.reader import DamagedCacheError, TeacherCache
from scalekd_ds.teacher_cache.records import Layout
from scalekd_ds.teacher_cache.shards import header, shard_path

LAYOUT = Layout((4, 8), "fp32", 5, None)


@pytest.fixture
def cache(tmp_path):
    write_cache(tmp_path / "cache", manifest_of(LAYOUT, samples=90, views=3, batch=4))
    return TeacherCache(tmp_path / "cache", max_bad_share=0.1)


def check(cache, indices, views):
    """Takes entries, compares them with what was written, and returns the views that were taken."""
    taken, entries = cache.take(np.asarray(indices), np.asarray(views))
    tokens, logits = cache.targets(entries)
    for place, (sample, view) in enumerate(zip(indices, taken.tolist(), strict=True)):
        expected_tokens, expected_logits = answers(int(sample), view, LAYOUT)
        assert torch.equal(tokens[place], expected_tokens) and torch.equal(logits[place], expected_logits)
    return taken


def test_any_entries_in_any_order(cache):
    rng = np.random.default_rng(0)
    for size in (1, 7, 64):
        indices, views = rng.integers(0, 90, size), rng.integers(0, 3, size)
        assert (check(cache, indices, views) == views).all()
    assert cache.seconds > 0.0 and not cache.damaged


def test_a_batch_in_the_order_of_training_is_one_read(cache, monkeypatch):
    from scalekd_ds.data.sampler import permutation
    from scalekd_ds.teacher_cache import reader

    reads = []
    plain = reader._Shard.read
    monkeypatch.setattr(reader._Shard, "read", lambda self, *where: reads.append(where) or plain(self, *where))
    order = permutation(cache.manifest.order_seed, 1, 90)
    check(cache, order[4:8], np.full(4, 1))
    assert len(reads) == 1
    # and one more where a shard ends
    check(cache, order[6:10], np.full(4, 1))
    assert cache.manifest.shard_entries == 8 and len(reads) == 3


def damage(cache, view, shard, place, count=1):
    path = shard_path(cache.folder, view, shard)
    dtype = LAYOUT.dtype
    start = len(header(dtype, cache.manifest.entries_of(shard)))
    with path.open("r+b") as file:
        for each in range(place, place + count):
            file.seek(start + each * dtype.itemsize + 40)
            file.write(b"\x01\x02\x03\x04")


def sample_at(cache, view, shard, place):
    from scalekd_ds.data.sampler import permutation

    return int(permutation(cache.manifest.order_seed, view, 90)[shard * cache.manifest.shard_entries + place])


def test_a_damaged_entry_is_named_counted_and_taken_from_another_view(cache, capsys):
    damage(cache, 1, 2, 3)
    sample = sample_at(cache, 1, 2, 3)
    others = [(sample + 1) % 90, (sample + 2) % 90]
    assert check(cache, [others[0], sample, others[1]], [1, 1, 1]).tolist() == [1, 2, 1]
    said = capsys.readouterr().err
    assert f"sample {sample} in view 1 is damaged" in said and "shard00002.npy" in said
    assert list(cache.damaged) == [(sample, 1)]
    # it is neither read nor named again
    assert check(cache, [sample], [1]).tolist() == [2]
    assert capsys.readouterr().err == ""


def test_many_damaged_entries_end_the_run(cache):
    for shard in range(6):
        damage(cache, 0, shard, 0, 8)
    with pytest.raises(DamagedCacheError, match=r"28 of 270 entries .* --verify"):
        cache.take(np.arange(90), np.zeros(90, dtype=np.int64))


def test_a_sample_without_any_intact_view_is_an_error(cache):
    cache.mark(5, 0, "is damaged"), cache.mark(5, 1, "is damaged"), cache.mark(5, 2, "is damaged")
    with pytest.raises(UserError, match="no view of sample 5"):
        cache.take(np.array([5]), np.array([1]))


def test_a_shard_of_another_view_is_not_taken_for_this_one(cache, capsys):
    """As when a folder was copied to the wrong place."""
    first, second = (shard_path(cache.folder, view, 0) for view in (0, 1))
    second.write_bytes(first.read_bytes())
    sample = sample_at(cache, 1, 0, 0)
    assert check(cache, [sample], [1]).tolist() == [2]
    assert "is damaged" in capsys.readouterr().err


def test_threads_and_jobs_share_a_cache(cache):
    errors = []

    def read(seed):
        rng = np.random.default_rng(seed)
        try:
            for _ in range(20):
                check(cache, rng.integers(0, 90, 8), rng.integers(0, 3, 8))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not errors


def edit(folder, **changes):
    path = folder / NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: edit(f, complete=False), "is unfinished: .* goes on"),
        (lambda f: edit(f, format=2, release="9.1"), "format 2, of scalekd_ds 9.1, .* up to 1: update"),
        (lambda f: (f / NAME).write_text("{"), "manifest .* is damaged"),
        (lambda f: edit(f, surprise=1), "manifest .* is damaged"),
        (lambda f: (f / NAME).unlink(), "holds no teacher cache .*scalekd cache --out"),
        (lambda f: shard_path(f, 1, 1).unlink(), r"shard00001.npy .*No such file"),
        (lambda f: shard_path(f, 1, 1).write_bytes(b"short"), "has 5 bytes and must have"),
    ],
)
def test_a_cache_that_cannot_be_read_says_what_to_do(cache, break_it, message):
    break_it(cache.folder)
    with pytest.raises(UserError, match=message) as error:
        TeacherCache(cache.folder)
    assert "\n" not in str(error.value)


def test_damaged_weights_of_the_last_stage_are_not_loaded(cache):
    assert torch.equal(cache.last_stage()["weight"], torch.ones(3))
    path = cache.folder / LAST_STAGE
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"last_stage\.safetensors of the teacher cache is damaged"):
        cache.last_stage()


def test_memory_does_not_grow_with_the_images(tmp_path):
    """50,000 entries, of which a reader holds no more than their places."""
    import tracemalloc

    layout = Layout((2, 16), "int8", 0, None)
    manifest = manifest_of(layout, samples=50_000, views=1, batch=500)
    write_cache_fast(tmp_path / "cache", manifest)
    cache = TeacherCache(tmp_path / "cache")
    rng = np.random.default_rng(0)
    cache.take(rng.integers(0, 50_000, 64), np.zeros(64, dtype=np.int64))
    tracemalloc.start()
    for _ in range(300):
        cache.take(rng.integers(0, 50_000, 64), np.zeros(64, dtype=np.int64))
    grown, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert grown < 200_000 and peak < 1_000_000, (grown, peak)


def write_cache_fast(folder, manifest):
    """As `write_cache`, with the same answer to all."""
    from scalekd_ds.teacher_cache.records import checksums

    layout = manifest.layout
    whole = write_cache(folder, manifest_of(layout, samples=manifest.batch, views=1, batch=manifest.batch))
    from scalekd_ds.data.sampler import permutation

    order = permutation(manifest.order_seed, 0, manifest.samples)
    for shard in range(manifest.shards_of_a_view):
        count = manifest.entries_of(shard)
        records = np.zeros(count, layout.dtype)
        records["sample"] = order[shard * manifest.shard_entries :][:count]
        records["checksum"] = checksums(records, manifest.key(0))
        path = shard_path(folder, 0, shard)
        path.write_bytes(header(layout.dtype, count) + records.tobytes())
    type(whole)(**{**vars(manifest), "complete": True, "shards": [[""] * manifest.shards_of_a_view]}).write(folder)
