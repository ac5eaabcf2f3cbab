"""Measures at what rate `scalekd cache` writes what its teacher answers; cached.py calls it."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import time
from pathlib import Path
from typing import Any

import timing

from scalekd_ds.caching.job import answers
from scalekd_ds.caching.order import batches_of
from scalekd_ds.caching.prepare import Built
from scalekd_ds.caching.writing import EntryWriter
from scalekd_ds.config import RunConfig
from scalekd_ds.data.sources.source import Source


def measure(cfg: RunConfig, built: Built, train: Source, root: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The loop of the job in turn with the loop without packing and writing.

    Args:
        cfg: The run, with its views.
        built: The teacher, on its device.
        train: The images.
        root: Where shards are written.
        args: `batch`, `batches` in a turn, `rounds` and `warmup`.

    Returns:
        `images_per_s` of both, and by median, p20 and p80 what the written rate is of the bare one: `write_rate` by the clock,
        `write_rate, processor` by the time of all threads of this process, `write_rate, in the loop` by what of the loop's
        own time it does not spend in the writer, which no neighbour disturbs.
    """
    device = next(built.teacher.model.parameters()).device
    # a turn is one shard: those of 1 GB end once in many such turns, and wait as long for the disk
    manifest = dataclasses.replace(built.manifest, shard_entries=args.batch * args.batches)
    batches = batches_of(manifest, 0, 0, 0)
    images, numbers = sum(batch.entries for batch in batches), itertools.count()
    processor: dict[str, list[float]] = {"bare": [], "written": []}
    # of each turn, the share that the loop does not spend in the writer, its wait for the disk at the end included
    own: list[float] = []

    def bare() -> None:
        begin = time.process_time()
        for _ in answers(cfg, built, manifest, batches, train, device):
            pass
        processor["bare"].append(time.process_time() - begin)

    def written() -> None:
        start, begin, out = time.perf_counter(), time.process_time(), root / f"written{next(numbers)}"
        out.mkdir()
        spent = 0.0
        with EntryWriter(out, manifest, device) as writer:
            for answer in answers(cfg, built, manifest, batches, train, device):
                given = time.perf_counter()
                writer.add(*answer)
                spent += time.perf_counter() - given
            given = time.perf_counter()
            writer.finish()
            spent += time.perf_counter() - given
        own.append(1.0 - spent / (time.perf_counter() - start))
        processor["written"].append(time.process_time() - begin)

    seconds = timing.seconds_of(timing.alternate({"bare": bare, "written": written}, device, args.rounds, args.warmup))
    busy = {name: found[-args.rounds :] for name, found in processor.items()}
    rates = {name: timing.quantiles([images / s for s in found]) for name, found in seconds.items()}
    return {
        "images_in_a_turn": images,
        "images_per_s": rates,
        "write_rate": timing.speedup(seconds["bare"], seconds["written"]),
        "write_rate, processor": timing.speedup(busy["bare"], busy["written"]),
        "write_rate, in the loop": timing.quantiles(own[-args.rounds :]),
    }
