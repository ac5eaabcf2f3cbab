"""The thread that writes entries: what it says where the disk fails or the teacher overflows, and what it leaves behind."""

import errno
import os
import re

import numpy as np
import pytest
import torch
from written_caches import answers, manifest_of

from scalekd_ds.caching.order import Batch
from scalekd_ds.caching.writing import EntryWriter
from scalekd_ds.errors import UserError
from scalekd_ds.teacher_cache.records import Layout, decode, unpack
from scalekd_ds.teacher_cache.shards import ShardWriter, entries_done, shard_path

LAYOUT = Layout((4, 8), "fp32", 5, None)
MANIFEST = manifest_of(LAYOUT, samples=256, views=1, batch=4)


def add(writer, first, tokens=None):
    """A batch of made-up answers."""
    samples = np.arange(first, first + 4)
    both = [answers(int(sample), 0, LAYOUT) for sample in samples]
    made = torch.stack([each for each, _ in both])
    logits = torch.stack([scores for _, scores in both])
    writer.add(Batch(0, 0, first, 4), samples, {}, torch.zeros(4, 3, 8, 8), made if tokens is None else tokens, logits)


def done(folder):
    path = shard_path(folder, 0, 0)
    return entries_done(path, LAYOUT.dtype, MANIFEST.entries_of(0), MANIFEST.batch, MANIFEST.key(0))


def test_a_full_disk_ends_in_a_line_and_loses_no_whole_batch(tmp_path, monkeypatch):
    assert MANIFEST.shard_entries == 16
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    plain, count = ShardWriter.append, []

    def append(self, records):
        count.append(len(records))
        if len(count) == 3:
            raise full
        plain(self, records)

    def close(self):
        self._file.close()
        # what is left in the buffer of a file does not fit either
        raise full

    monkeypatch.setattr(ShardWriter, "append", append)
    monkeypatch.setattr(ShardWriter, "close", close)
    message = (
        rf"the cache {re.escape(str(tmp_path))} cannot be written \(No space left on device.* goes on where it ended"
    )
    with pytest.raises(UserError, match=message), EntryWriter(tmp_path, MANIFEST, torch.device("cpu")) as writer:
        for first in (0, 4, 8):
            add(writer, first)
    monkeypatch.undo()
    assert done(tmp_path) == 8


def test_an_answer_that_is_not_finite_is_not_kept(tmp_path):
    tokens = torch.zeros(4, 4, 8)
    tokens[2, 1, 3] = torch.nan
    with (
        pytest.raises(UserError, match=r"answer to image 6 is not finite: .* --run.teacher_precision fp32"),
        EntryWriter(tmp_path, MANIFEST, torch.device("cpu")) as writer,
    ):
        add(writer, 0)
        add(writer, 4, tokens)
    assert done(tmp_path) == 4


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_eight_bits_hide_no_overflow(tmp_path, value):
    layout = Layout((4, 8), "int8", 5, None)
    manifest = manifest_of(layout, samples=256, views=1, batch=4)
    tokens = torch.randn(4, 4, 8)
    tokens[1, 0, 0] = value
    with (
        pytest.raises(UserError, match="answer to image 1 is not finite"),
        EntryWriter(tmp_path, manifest, torch.device("cpu")) as writer,
    ):
        add(writer, 0, tokens)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [LAYOUT, Layout((4, 8), "int8", 5, 3), Layout((4, 8), "bf16", 0, None)])
def test_a_gpu_writes_and_reads_what_a_cpu_does(tmp_path, layout):
    """Answers are encoded there, and copied beside the next batch; entries are decoded there."""
    manifest = manifest_of(layout, samples=256, views=1, batch=4)
    files, targets = [], []
    for device in (torch.device("cpu"), torch.device("cuda", 0)):
        folder = tmp_path / device.type
        folder.mkdir()
        with EntryWriter(folder, manifest, device) as writer:
            for first in range(0, manifest.shard_entries, 4):
                samples = np.arange(first, first + 4)
                both = [answers(int(sample), 0, layout) for sample in samples]
                tokens = torch.stack([each for each, _ in both]).to(device)
                logits = torch.stack([scores for _, scores in both]).to(device) if layout.classes else None
                images = torch.full((4, 3, 8, 8), float(first), device=device)
                writer.add(Batch(0, 0, first, 4), samples, {}, images, tokens, logits)
        records = np.load(shard_path(folder, 0, 0))
        files.append({name: records[name] for name in records.dtype.names if name != "checksum"})
        entries = {name: values.to(device) for name, values in unpack(layout, records).items()}
        targets.append([None if each is None else each.cpu() for each in decode(layout, entries)])
    for name in files[0]:
        # the logarithms of a GPU may differ in their last bit
        assert np.allclose(files[0][name], files[1][name], rtol=1e-5, atol=1e-6), name
    for one, other in zip(*targets, strict=True):
        assert (one is None and other is None) or torch.allclose(one, other, rtol=1e-5, atol=1e-5)
