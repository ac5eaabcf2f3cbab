"""Teacher caches of made-up answers, for tests of what is on disk."""

import numpy as np
import torch
from safetensors.torch import save_file

from scalekd_ds.data.sampler import permutation
from scalekd_ds.teacher_cache.manifest import LAST_STAGE, Manifest
from scalekd_ds.teacher_cache.records import encode, pack, to_numpy
from scalekd_ds.teacher_cache.shards import ShardWriter, digest_of, notes_path, shard_entries, shard_path


def answers(sample, view, layout):
    """Tokens (P, C) and logits (K,) of an entry, a function of its sample and its view."""
    rng = torch.Generator().manual_seed(1000 * view + sample)
    tokens = torch.randn(*layout.tokens, generator=rng) if layout.tokens else torch.empty(0)
    return tokens, torch.randn(layout.classes, generator=rng) if layout.classes else None


def manifest_of(layout, samples=20, views=2, batch=4, **changes):
    values = {
        "release": "0",
        "samples": samples,
        "views": views,
        "view_seed": 3,
        "order_seed": 5,
        "subset_seed": 5,
        "batch": batch,
        "shard_entries": shard_entries(samples, batch, layout.dtype.itemsize),
        "layout": layout,
        "settings": {"data.image_size": 32},
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "data": {"count": samples, "digest": "d", "files": "f"},
        "teacher": {"num_classes": layout.classes},
        "digests": {"teacher_digest": "t", "teacher_statistics": "s"},
        "last_stage": "",
        "packages": {},
    }
    return Manifest(**(values | changes))


def records_of(manifest, view, samples, reasons=()):
    """The records of samples in a view."""
    layout, bad = manifest.layout, dict(reasons)
    both = [answers(int(sample), view, layout) for sample in samples]
    tokens = torch.stack([t for t, _ in both])
    logits = torch.stack([scores for _, scores in both]) if layout.classes else None
    fields = {name: to_numpy(value) for name, value in encode(layout, tokens, logits).items()}
    fields["colour"] = np.stack([np.full(3, sample, np.float32) for sample in samples])
    return pack(layout, np.asarray(samples), bad, fields, manifest.key(view))


def write_cache(folder, manifest, reasons=()):
    """Writes a whole cache of made-up answers, and returns its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"weight": torch.ones(3)}, folder / LAST_STAGE)
    digests = []
    for view in range(manifest.views):
        order = permutation(manifest.order_seed, view, manifest.samples)
        digests.append([])
        for shard in range(manifest.shards_of_a_view):
            path = shard_path(folder, view, shard)
            path.parent.mkdir(exist_ok=True)
            count, key = manifest.entries_of(shard), manifest.key(view)
            writer = ShardWriter(path, manifest.layout.dtype, count, manifest.batch, key)
            first = shard * manifest.shard_entries
            for place in range(0, count, manifest.batch):
                samples = order[first + place : first + min(count, place + manifest.batch)]
                writer.append(records_of(manifest, view, samples, reasons))
            writer.finish()
            digests[-1].append(digest_of(path))
            assert notes_path(path).exists()
    values = {**vars(manifest), "shards": digests, "complete": True, "bad": dict(reasons)}
    whole = Manifest(**(values | {"last_stage": digest_of(folder / LAST_STAGE)}))
    whole.write(folder)
    return whole
