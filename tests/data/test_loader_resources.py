"""What loaders hold and for how long: threads, memory, files that are read once, and time beside the caller's own."""

import gc
import threading
import weakref
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from image_fixtures import make_folder
from launching import LIMIT
from loading import eval_loader, take, train_loader

from scalekd_ds.config import DataConfig
from scalekd_ds.data import reader
from scalekd_ds.data.sources import image_folder
from scalekd_ds.data.sources.image_folder import index_folder
from scalekd_ds.errors import UserError


def test_a_batch_keeps_its_pixels_while_further_ones_are_made(source):
    batches = iter(train_loader(source, DataConfig(image_size=32)))
    first, _ = next(batches)
    copy = first.clone()
    for _ in range(6):
        next(batches)
    assert torch.equal(first, copy)


def test_threads_end_with_the_iterator_and_with_the_loader(source):
    def tasks():
        return len(list(Path("/proc/self/task").iterdir()))

    cfg = DataConfig(image_size=32)
    take(train_loader(source, cfg), 1)
    gc.collect()
    before = tasks()
    loader = train_loader(source, cfg)
    batches = iter(loader)
    next(batches)
    assert tasks() > before
    loader.close()
    assert next(batches, None) is None
    batches = iter(loader)
    next(batches)
    del batches, loader
    list(eval_loader(source, cfg, 4))
    gc.collect()
    assert tasks() <= before
    assert not [t for t in threading.enumerate() if t.name.startswith("read-images")]


@pytest.mark.parametrize("taken", [1, None], ids=["closed", "ended"])
def test_the_pipeline_of_an_evaluation_is_gone_when_its_memory_is_given_back(source, monkeypatch, taken):
    loader = eval_loader(source, DataConfig(image_size=32), 4)
    pipelines, alive = [], []
    build = loader._build_pipeline

    def remembered(prepare):
        pipeline = build(prepare)
        pipelines.append(weakref.ref(pipeline))
        return pipeline

    monkeypatch.setattr(loader, "_build_pipeline", remembered)
    monkeypatch.setattr(loader, "_after_pipeline", lambda: alive.append(pipelines[-1]() is not None))
    assert not pipelines, "a pipeline is built when images are asked for"
    for _ in range(2):
        take(loader, taken) if taken else list(loader)
    assert len(pipelines) == 2 and alive == [False, False]


def test_a_small_set_is_read_once_and_a_large_one_is_not_kept(tmp_path):
    make_folder(tmp_path, {"a": 3, "b": 3})
    source = index_folder(tmp_path, "data.train")
    paths = source.paths
    small, large = reader.Reader(source, keep_bytes=2**20), reader.Reader(source, keep_bytes=1000)
    first = [each.encoded(0) for each in (small, large)]
    assert np.array_equal(*first)
    Path(paths[0]).unlink()
    assert np.array_equal(small.encoded(0), first[0])
    with pytest.raises(UserError, match="cannot be read"):
        large.encoded(0)


def test_the_next_batch_is_read_while_the_caller_computes(source, monkeypatch):
    """A caller that holds a batch, and asks for nothing, sees all files of the next one read."""
    read_file, read, micro = image_folder.read_file, threading.Semaphore(0), 12

    def counted(*args, **kwargs):
        data = read_file(*args, **kwargs)
        read.release()
        return data

    loader = train_loader(source, DataConfig(image_size=32, threads=4, keep_mb=0), micro=micro)
    # after the loader has read a few for an estimate of their size
    monkeypatch.setattr(image_folder, "read_file", counted)
    batches = iter(loader)
    for _ in range(8):
        next(batches)
        assert all(read.acquire(timeout=LIMIT) for _ in range(micro))
    # the last batch that was asked for, and one more: what the caller has not come to yet
    assert all(read.acquire(timeout=LIMIT) for _ in range(micro))
    loader.close()


def test_a_loaders_memory_does_not_grow(tmp_path):
    """Two thousand images after the first six hundred; `benchmarks/loader.py --soak 50000` is the long form."""
    source = index_folder(make_folder(tmp_path, {"a": 20, "b": 20}, (160, 200)), "data.train")
    cfg = DataConfig(image_size=64, auto_augment="rand-m9-n2-mstd0.5-inc1", random_erasing=0.5, keep_mb=0)
    batches = iter(train_loader(source, cfg, micro=20))
    process, resident = psutil.Process(), []
    for number in range(130):
        next(batches)
        if number % 10 == 9:
            resident.append(process.memory_info().rss / 2**20)
    # between them are 1,200 images, 59 MB as they are given out: a loader that kept half of them would be over this
    assert max(resident[-5:]) - max(resident[2:7]) < 24, resident
