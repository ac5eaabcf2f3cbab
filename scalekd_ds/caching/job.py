"""The job of `scalekd cache`: the teacher answers to every view of every image, over all ranks, from where a kill ended it."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from deepspeed import comm as dist

from scalekd_ds.caching.folder import agreed, begin, check_room, complete, make_folder
from scalekd_ds.caching.options import CacheOptions, checked
from scalekd_ds.caching.order import Batch, CacheSampler, batches_of, unfinished_shards
from scalekd_ds.caching.prepare import Built, build, place, with_views
from scalekd_ds.caching.progress import CacheProgress
from scalekd_ds.caching.sizes import bytes_of, describe
from scalekd_ds.caching.writing import EntryWriter
from scalekd_ds.cluster.folder_lock import held
from scalekd_ds.cluster.heartbeat import Heartbeat
from scalekd_ds.cluster.launcher import check_hostfile
from scalekd_ds.cluster.ranks import join_ranks
from scalekd_ds.config import RunConfig
from scalekd_ds.data.run_sources import read_sources
from scalekd_ds.data.sources.source import Source
from scalekd_ds.data.view_loader import ViewLoader
from scalekd_ds.engine.compilation import eagerly, naming_the_compiler
from scalekd_ds.engine.determinism import choose_algorithms
from scalekd_ds.engine.processes import job_store, start_processes
from scalekd_ds.engine.time_limits import lift_time_limits, nccl_error
from scalekd_ds.errors import say
from scalekd_ds.names import escape, shell_word
from scalekd_ds.process import signals
from scalekd_ds.teacher_cache.manifest import Manifest, read_manifest
from scalekd_ds.teacher_cache.shards import entries_done, shard_path


def make_cache(cfg: RunConfig, options: CacheOptions) -> None:
    """Makes a cache, or what is missing of it; collective.

    Args:
        cfg: The run whose teacher and images it is of.
        options: What is cached, and where.

    Raises:
        UserError: The run, its data or its teacher cannot be used, or the folder holds another cache, or too little room.
        RankLostError: Another rank failed, died, or cannot be reached.
    """
    checked(cfg, options)
    cfg = with_views(cfg, options)
    if options.dry_run:
        train, _ = read_sources(cfg)
        _say_sizes(build(cfg, options, train).manifest, options)
        return
    check_hostfile()
    join_ranks()
    train, val = read_sources(cfg)
    device = start_processes()
    choose_algorithms(cfg.run.deterministic, device.type)
    with ExitStack() as stack:
        store = job_store()
        limits = cfg.run.rank_timeout, cfg.run.hang_timeout
        stacks, hint = options.out / "stacks", "What is written stays: give the same command again."
        heartbeat = Heartbeat(store, dist.get_rank(), dist.get_world_size(), stacks, *limits, nccl_error, hint)
        stack.enter_context(heartbeat)
        lift_time_limits()
        if dist.get_rank() == 0:
            make_folder(options.out)
            stack.enter_context(held(options.out, "--out"))
        dist.barrier()
        _make(cfg, options, train, val, device, store, heartbeat)


def _make(
    cfg: RunConfig,
    options: CacheOptions,
    train: Source,
    val: Source,
    device: torch.device,
    store: Any,
    heartbeat: Heartbeat,
) -> None:
    built = build(cfg, options, train)
    manifest = agreed(built, options)
    # every rank has read what is there before one of them writes
    dist.barrier()
    # rank 0's, since a file system of a network may show another state to each node
    listed = [unfinished_shards(options.out, manifest)]
    if dist.get_world_size() > 1:
        torch.distributed.broadcast_object_list(listed)
    (missing,) = listed
    if not missing and manifest.complete:
        say(f"{escape(options.out)} is complete: {describe(manifest)}")
        return
    # a shard of a complete cache that was removed, since it was damaged, is made again
    manifest = dataclasses.replace(manifest, complete=False)
    gate = place(built, cfg, val, len(train.classes), device)
    if dist.get_rank() == 0:
        manifest = begin(built, manifest, gate, options.out)
    dist.barrier()
    manifest = read_manifest(options.out, unfinished=True)
    mine = missing[dist.get_rank() :: dist.get_world_size()]
    batches = [batch for shard in mine for batch in _left_of(options.out, manifest, *shard)]
    counts = torch.tensor([len(batches), sum(batch.entries for batch in batches)], dtype=torch.int64, device=device)
    longest = counts[:1].clone()
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    dist.all_reduce(counts)
    total = manifest.samples * manifest.views
    if dist.get_rank() == 0:
        check_room(options.out, int(counts[1]) * manifest.layout.dtype.itemsize)
        say(f"{escape(options.out)}: {describe(manifest)}; {int(counts[1]):,} entries are to be made")
    signals.outcome("what is written stays, and the same command goes on from there")
    shows = dist.get_rank() == 0 and cfg.run.progress not in ("quiet", "none")
    with CacheProgress(total, total - int(counts[1]), store, shows) as progress:
        _answer(cfg, built, manifest, options.out, batches, train, device, int(longest), progress, heartbeat)
    dist.barrier()
    if dist.get_rank() == 0:
        complete(options.out, manifest)
        say(
            f"{escape(options.out)} is complete: {describe(manifest)}, {progress.rate():,.0f} images/s; train from it with "
            f"--teacher_cache {shell_word(options.out)}"
        )
    dist.barrier()


def _answer(
    cfg: RunConfig,
    built: Built,
    manifest: Manifest,
    out: Path,
    batches: list[Batch],
    train: Source,
    device: torch.device,
    longest: int,
    progress: CacheProgress,
    heartbeat: Heartbeat,
) -> None:
    """Makes the entries of this rank's batches."""
    try:
        with (
            closing(answers(cfg, built, manifest, batches, train, device)) as made,
            EntryWriter(out, manifest, device) as writer,
            naming_the_compiler(cfg.run.compile),
        ):
            for answer in made:
                writer.add(*answer)
                progress.advance(answer.batch.entries)
                heartbeat.progress()
            if built.teacher.engine:
                # the ranks gather a sharded teacher's weights together, as often as the one with most batches
                blank = torch.zeros(manifest.batch, 3, cfg.data.image_size, cfg.data.image_size, device=device)
                for _ in range(longest - len(batches)):
                    _targets(built, blank, manifest.batch)
                    heartbeat.progress()
    except RuntimeError as error:
        heartbeat.raise_if_lost(error)
        raise


class Answer(NamedTuple):
    """A teacher's answer to a batch, as `EntryWriter.add` takes it; its fields are described there."""

    batch: Batch
    samples: np.ndarray
    reasons: dict[int, str]
    images: torch.Tensor
    tokens: torch.Tensor
    logits: torch.Tensor | None


def answers(
    cfg: RunConfig, built: Built, manifest: Manifest, batches: list[Batch], train: Source, device: torch.device
) -> Generator[Answer]:
    """The teacher's answers to batches, one after the other; closing it ends the loader.

    Args:
        cfg: The run, with its views.
        built: The teacher, on its device.
        manifest: What is cached.
        batches: The batches, in their order.
        train: The images.
        device: Device of the teacher.

    Raises:
        UserError: Too many images are bad, or torch.compile failed.
    """
    loader = ViewLoader(
        train, cfg.data, CacheSampler(manifest, batches), device, manifest.mean, manifest.std, 0, len(batches)
    )
    features, has_logits = manifest.layout.tokens is not None, manifest.layout.classes > 0
    try:
        for batch, (images, ordered, real) in zip(batches, loader, strict=True):
            targets = _targets(built, images, manifest.batch)
            reasons = {index: loader.bad_files.reasons[index] for index in ordered[ordered != real].tolist()}
            tokens = targets.tokens if features else targets.tokens.new_empty(0)
            yield Answer(batch, ordered, reasons, images, tokens, targets.logits if has_logits else None)
    finally:
        loader.close()


def _targets(built: Built, images: torch.Tensor, batch: int) -> Any:
    if len(images) == batch:
        return built.distiller.teacher_targets(images)
    # a compiled teacher would be compiled anew for the short batch at the end of a view
    with eagerly():
        return built.distiller.teacher_targets(images)


def _left_of(out: Path, manifest: Manifest, view: int, shard: int) -> list[Batch]:
    """The batches of a shard that are not written yet."""
    count, key = manifest.entries_of(shard), manifest.key(view)
    done = entries_done(shard_path(out, view, shard), manifest.layout.dtype, count, manifest.batch, key)
    return batches_of(manifest, view, shard, done)


def _say_sizes(manifest: Manifest, options: CacheOptions) -> None:
    print(f"{escape(options.out)} would hold {describe(manifest)}, {manifest.layout.dtype.itemsize:,} bytes an entry")
    place = next((p for p in (options.out, *options.out.absolute().parents) if p.exists()), Path("/"))
    check_room(place, bytes_of(manifest))
