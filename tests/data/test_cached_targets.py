"""Targets by sample and view that come with the batches: which views are taken, and what happens where one is gone."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from image_fixtures import make_folder
from loading import CPU, RAW, take

from scalekd_ds.config import DataConfig
from scalekd_ds.data import StreamSampler, TrainLoader
from scalekd_ds.data.sources.image_folder import index_folder
from scalekd_ds.data.view_mix import draw_mix
from scalekd_ds.errors import UserError

VIEWS = 3
CFG = DataConfig(image_size=16, views=VIEWS)
MIXED = DataConfig(image_size=16, views=VIEWS, mix_by="view", cutmix=1.0, max_bad_share=0.1)


class Targets:
    """A cache in memory, whose target of a view is (sample, view)."""

    def __init__(self, bad=None, damaged=()):
        self.bad, self.damaged, self.marked = dict(bad or {}), set(damaged), {}
        self.threads = set()

    def take(self, indices, views):
        assert indices.dtype == views.dtype == np.int64 and not set(indices.tolist()) & set(self.bad)
        self.threads.add(threading.current_thread().name)
        taken = [self._view(*each) for each in zip(indices.tolist(), views.tolist(), strict=True)]
        pairs = torch.tensor(list(zip(indices.tolist(), taken, strict=True)), dtype=torch.float32)
        return np.array(taken), {"pairs": pairs, "bytes": pairs.to(torch.uint8)}

    def _view(self, index, view):
        for view in ((view + step) % VIEWS for step in range(VIEWS)):
            if (index, view) not in self.damaged and (index, view) not in self.marked:
                return view
        raise UserError(f"no view of sample {index} is left")

    def mark(self, index, view, reason):
        self.marked[index, view] = reason


def loader(source, cfg, micro, cached=None):
    sampler = StreamSampler(len(source), 0, micro, micro, 0, 1, views=cfg.views)
    return TrainLoader(source, cfg, sampler, CPU, *RAW, cached=cached)


@pytest.fixture
def folder(tmp_path):
    make_folder(tmp_path, {"a": 6, "b": 6})
    return index_folder(tmp_path, "data.train")


def images_by_view(source, cfg):
    """(sample, view) -> its image and its target, without a cache."""
    found = {}
    batches = loader(source, cfg, len(source))
    for step, (images, targets) in enumerate(take(batches, VIEWS)):
        for index, view, *each in zip(*batches.sampler.indices(step, 0), images, targets, strict=True):
            found[int(index), int(view)] = each
    return found


def check(batch, expected):
    """Each image and its target are those of the view that the cache gave."""
    images, targets, cached = batch
    for image, target, (index, view) in zip(images, targets, cached["pairs"].int().tolist(), strict=True):
        assert torch.equal(image, expected[index, view][0]) and torch.equal(target, expected[index, view][1])


@pytest.mark.parametrize("cfg", [CFG, MIXED])
def test_targets_come_with_the_views_that_they_are_of(source, cfg):
    cached = Targets()
    batches = loader(source, cfg, 4, cached)
    expected = images_by_view(source, cfg)
    for step, batch in enumerate(take(batches, 9)):
        check(batch, expected)
        indices, views = batches.sampler.indices(step, 0)
        assert batch[2]["pairs"].int().tolist() == np.stack([indices, views], 1).tolist()
        assert batch[2]["bytes"].dtype == torch.uint8
    assert not cached.marked and all(name.startswith("read-images") for name in cached.threads)


@pytest.mark.parametrize("cfg", [CFG, MIXED])
def test_the_image_is_of_the_view_that_takes_the_place_of_a_damaged_one(source, cfg):
    cached = Targets(damaged={(index, index % VIEWS) for index in range(12)})
    expected = images_by_view(source, cfg)
    for batch in take(loader(source, cfg, 12, cached), VIEWS):
        check(batch, expected)
        assert not {tuple(pair) for pair in batch[2]["pairs"].int().tolist()} & cached.damaged


def test_files_that_were_bad_when_the_cache_was_written_are_replaced_without_a_word(folder, capfd):
    # they are readable now, and still have no targets
    cached = Targets(bad={1: "was cut off", 7: "was empty", 8: "was empty"})
    batches = loader(folder, DataConfig(image_size=16, views=VIEWS, max_bad_share=0.0), 12, cached)
    expected = images_by_view(folder, CFG)
    for step, batch in enumerate(take(batches, 3)):
        check(batch, expected)
        assert batch[1].tolist() == folder.labels[batches.sampler.indices(step, 0)[0]].tolist()
    assert batches.bad_files.reasons == cached.bad and capfd.readouterr().err == ""
    # what has turned bad since counts
    Path(folder.paths[3]).write_bytes(b"")
    with pytest.raises(UserError, match=r"1 of 12 training images cannot be used.*003.jpg is empty"):
        take(loader(folder, DataConfig(image_size=16, views=VIEWS, max_bad_share=0.0), 12, cached), 3)


def partners(source, cfg):
    """(sample, view) -> its partner where that shows."""
    size = len(source)
    drawn = {(i, view): draw_mix(cfg, 0, view, i, size) for i in range(size) for view in range(VIEWS)}
    return {key: mix.partner for key, mix in drawn.items()}


@pytest.mark.parametrize("damage", [b"", b"II*\x00" + bytes(200)], ids=["found by the reader", "found by the decoder"])
def test_a_view_whose_partner_has_turned_bad_is_marked_and_another_is_taken(folder, damage):
    expected, bad = images_by_view(folder, MIXED), 4
    Path(folder.paths[bad]).write_bytes(damage)
    gone = {key for key, partner in partners(folder, MIXED).items() if partner == bad}
    cached = Targets()
    batches = loader(folder, MIXED, 12, cached)
    seen = take(batches, 2 * VIEWS)
    for batch in seen:
        check(batch, expected)
        assert not {tuple(pair) for pair in batch[2]["pairs"].int().tolist()} & gone
    # all that a sample but the bad one itself was asked for
    assert set(cached.marked) == {key for key in gone if key[0] != bad} and len(gone) > 1
    assert all(folder.paths[bad] in reason for reason in cached.marked.values())
    assert list(batches.bad_files.reasons) == [bad]


def test_a_view_whose_partner_was_replaced_when_the_cache_was_written_is_taken(folder):
    bad, cached = 4, Targets(bad={4: "was empty"})
    # as a job that writes a cache makes them, which finds the file bad
    content = Path(folder.paths[bad]).read_bytes()
    Path(folder.paths[bad]).write_bytes(b"")
    expected = images_by_view(folder, MIXED)
    Path(folder.paths[bad]).write_bytes(content)
    for batch in take(loader(folder, MIXED, 12, cached), VIEWS):
        check(batch, expected)
    assert not cached.marked


def test_a_sample_without_any_view_ends_the_run(source):
    cached = Targets(damaged={(5, view) for view in range(VIEWS)})
    with pytest.raises(UserError, match="no view of sample 5 is left"):
        take(loader(source, CFG, 12, cached), 1)
