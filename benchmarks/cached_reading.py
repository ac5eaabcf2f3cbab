"""Measures how fast entries of a teacher cache are read, beside plain reads of the same bytes; cached.py calls it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import harness
import numpy as np
import timing
import torch

from scalekd_ds.data.sampler import permutation
from scalekd_ds.teacher_cache.manifest import Manifest
from scalekd_ds.teacher_cache.reader import TeacherCache
from scalekd_ds.teacher_cache.records import Store, encode, pack, to_numpy
from scalekd_ds.teacher_cache.shards import ShardWriter, header, shard_entries, shard_path

CPU = torch.device("cpu")


def made_up_cache(folder: Path, like: Manifest, store: Store, entries: int) -> TeacherCache:
    """A cache of one view, of made-up answers in the shapes of another cache."""
    layout = dataclasses.replace(like.layout, store=store)
    size = shard_entries(entries, like.batch, layout.dtype.itemsize)
    manifest = dataclasses.replace(
        like, samples=entries, views=1, layout=layout, shard_entries=size, bad={}, complete=True
    )
    tokens = torch.randn(like.batch, *layout.tokens) if layout.tokens else torch.empty(0)
    logits = torch.randn(like.batch, layout.classes) if layout.classes else None
    fields = {name: to_numpy(values) for name, values in encode(layout, tokens, logits).items()}
    fields["colour"] = np.zeros((like.batch, 3), np.float32)
    order, key = permutation(manifest.order_seed, 0, entries), manifest.key(0)
    shard_path(folder, 0, 0).parent.mkdir(parents=True)
    for shard in range(manifest.shards_of_a_view):
        count = manifest.entries_of(shard)
        writer = ShardWriter(shard_path(folder, 0, shard), layout.dtype, count, like.batch, key)
        for first in range(shard * size, shard * size + count, like.batch):
            samples = order[first : first + like.batch]
            writer.append(pack(layout, samples, {}, fields, key))
        writer.finish()
    manifest.write(folder)
    return TeacherCache(folder)


def plain_reads(cache: TeacherCache, places: np.ndarray, at_once: bool) -> Callable[[], None]:
    """Reads the bytes of entries, and does nothing with them.

    Args:
        cache: The cache.
        places: (N, B) places of the entries of N batches in their view.
        at_once: The entries of a batch follow each other in one shard.
    """
    manifest, size = cache.manifest, cache.manifest.layout.dtype.itemsize
    shards = range(manifest.shards_of_a_view)
    files = [os.open(shard_path(cache.folder, 0, shard), os.O_RDONLY) for shard in shards]
    starts = [len(header(manifest.layout.dtype, manifest.entries_of(shard))) for shard in shards]
    count = places.shape[1] if at_once else 1
    reads = []
    for place in (places[:, 0] if at_once else places.flatten()).tolist():
        shard, first = divmod(place, manifest.shard_entries)
        reads.append((files[shard], count * size, starts[shard] + first * size))

    def read() -> None:
        for each in reads:
            os.pread(*each)

    return read


def reading_calls(cache: TeacherCache) -> dict[str, Callable[[], None]]:
    """Name -> a turn over all entries."""
    count, batch = cache.manifest.samples, cache.manifest.batch
    order, views = permutation(cache.manifest.order_seed, 0, count), np.zeros(batch, np.int64)
    drawn = np.random.default_rng(0).permutation(count)
    calls: dict[str, Callable[[], None]] = {}
    for name, places in (("in order", np.arange(count)), ("random", drawn)):
        rows = places.reshape(-1, batch)

        def take(rows: np.ndarray = rows) -> None:
            for row in rows:
                cache.take(order[row], views)

        calls[name] = take
        calls[f"pread {name}"] = plain_reads(cache, rows, name == "in order")
    return calls


def measure(root: Path, like: Manifest, entries: int, rounds: int, warmup: int) -> list[dict[str, Any]]:
    """A row for each way of storing tokens and each order.

    Args:
        root: Where the made-up caches are written.
        like: A manifest whose shapes, batch and order they have.
        entries: Entries of each; those above a multiple of the batch are left out.
        rounds: Rounds in which all are read.
        warmup: Such rounds before these.

    Raises:
        RuntimeError: An entry was damaged.
    """
    rows = []
    entries = max(1, entries // like.batch) * like.batch
    for store in get_args(Store):
        cache = made_up_cache(root / f"made_up_{store}", like, store, entries)
        seconds = timing.seconds_of(timing.alternate(reading_calls(cache), CPU, rounds, max(1, warmup)))
        if cache.damaged:
            raise RuntimeError(f"{len(cache.damaged)} made-up entries are damaged.")
        size = cache.layout.dtype.itemsize
        for order in ("in order", "random"):
            rates, floors = ([entries / s for s in seconds[name]] for name in (order, f"pread {order}"))
            rows.append(
                {
                    "store": store,
                    "order": order,
                    "bytes_of_an_entry": size,
                    "entries_per_s": timing.quantiles(rates),
                    "mb_per_s": size * float(np.median(rates)) / 1e6,
                    "floor_mb_per_s": size * float(np.median(floors)) / 1e6,
                    "of_floor": timing.quantiles([a / b for a, b in zip(rates, floors, strict=True)]),
                }
            )
    return rows


def show(rows: list[dict[str, Any]], predicted: dict[str, dict[str, float]]) -> None:
    """Prints the rows beside the predictions, entries/s by store and order."""
    table = []
    for row in rows:
        rate, name = row["entries_per_s"], f"{row['store']}, {row['order']}"
        cells = [rate["median"], rate["p20"], rate["p80"], row["mb_per_s"], row["floor_mb_per_s"]]
        table.append([name, *cells, row["of_floor"]["median"], predicted.get(row["store"], {}).get(row["order"])])
    head = ["reading, entries/s", "median", "p20", "p80", "MB/s", "pread MB/s", "of floor", "predicted"]
    harness.print_table(head, table)
