"""Shards go on from where their writer was killed, at any byte, and are then the bytes of an uninterrupted one."""

import numpy as np
import pytest
from written_caches import manifest_of, records_of

from scalekd_ds.teacher_cache.records import Layout
from scalekd_ds.teacher_cache.shards import ShardWriter, digest_of, entries_done, header, notes_path, shard_entries

LAYOUT = Layout((4, 8), "int8", 5, None)
SAMPLES = np.arange(10)


def write(path, manifest, stop_after=None):
    """Writes a shard from where it is, up to so many batches."""
    writer = ShardWriter(path, LAYOUT.dtype, len(SAMPLES), 4, manifest.key(0))
    batches = list(range(writer.done, len(SAMPLES), 4))
    for first in batches[:stop_after]:
        writer.append(records_of(manifest, 0, SAMPLES[first : first + 4], {6: "is no image"}))
    if writer.done == len(SAMPLES):
        writer.finish()
    writer.close()
    return len(batches[:stop_after])


def test_a_shard_that_is_cut_off_anywhere_goes_on(tmp_path):
    manifest = manifest_of(LAYOUT, samples=10)
    whole = tmp_path / "whole.npy"
    write(whole, manifest)
    data, notes = whole.read_bytes(), notes_path(whole).read_text()
    assert digest_of(whole) in notes and "is no image" in notes
    record, start = LAYOUT.dtype.itemsize, len(header(LAYOUT.dtype, 10))
    places = (0, 5, start, start + 1, start + 4 * record - 1, start + 4 * record, start + 9 * record, len(data))
    for cut, rubbish in [(place, rubbish) for place in places for rubbish in (b"", b"\xff" * 300)]:
        path = tmp_path / f"cut{cut}_{len(rubbish)}.npy"
        partial = path.with_name(f".{path.name}.partial")
        # what a machine that lost its power has left of a file may be anything
        partial.write_bytes(data[:cut] + rubbish)
        wanted = max(0, cut - start) // record
        done = entries_done(path, LAYOUT.dtype, 10, 4, manifest.key(0))
        assert done == (10 if wanted == 10 else wanted // 4 * 4)
        if done < 10:
            assert not path.exists()
            assert write(path, manifest) == -(-(10 - done) // 4)
        assert path.read_bytes() == data and notes_path(path).read_text() == notes
        assert not partial.exists()


def test_a_shard_is_an_array_that_numpy_opens(tmp_path):
    manifest = manifest_of(LAYOUT, samples=10)
    write(tmp_path / "a.npy", manifest)
    records = np.load(tmp_path / "a.npy", mmap_mode="r", allow_pickle=False)
    assert records["sample"].tolist() == [0, 1, 2, 3, 4, 5, -1, 7, 8, 9]
    assert records["tokens"].shape == (10, 4, 8)


def test_what_another_cache_has_left_is_not_gone_on_with(tmp_path):
    write(tmp_path / "a.npy", manifest_of(LAYOUT, samples=10), stop_after=2)
    other = manifest_of(LAYOUT, samples=10, view_seed=4)
    assert entries_done(tmp_path / "a.npy", LAYOUT.dtype, 10, 4, other.key(0)) == 0


def test_nothing_is_made_by_asking(tmp_path):
    assert entries_done(tmp_path / "a.npy", LAYOUT.dtype, 10, 4, 0) == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("samples", [1, 3, 100, 60_000, 1_281_167])
def test_shards_are_of_whole_batches_for_several_ranks_and_of_a_gigabyte_at_most(samples):
    for record in (100, 80_000, 5_000_000):
        entries = shard_entries(samples, 32, record)
        assert entries % 32 == 0 and entries >= 32
        assert entries * record <= 10**9 or entries == 32
        assert -(-samples // entries) >= min(8, -(-samples // 32))
