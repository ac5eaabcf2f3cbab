"""The folder of a cache: what is there when a command begins, and what makes it complete."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from scalekd_ds.caching.options import CacheOptions
from scalekd_ds.caching.order import Batch, CacheSampler
from scalekd_ds.caching.prepare import Built
from scalekd_ds.errors import UserError, cure_of, problem_of
from scalekd_ds.files.durable import save_tensors, written_aside
from scalekd_ds.files.room import free_bytes
from scalekd_ds.names import escape
from scalekd_ds.teacher_cache.manifest import LAST_STAGE, NAME, Manifest, read_manifest
from scalekd_ds.teacher_cache.shards import digest_of, notes_path, shard_path
from scalekd_ds.teacher_cache.sizes import format_decimal

# fields of a manifest that a command must share with the cache that it goes on with
_SAME = ("settings", "view_seed", "order_seed", "subset_seed", "batch", "mean", "std", "data", "digests")


def make_folder(out: Path) -> None:
    """Makes the folder of a cache where it does not exist.

    Raises:
        UserError: It cannot be made, or holds something else.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--out is {escape(out)}, which cannot be made ({problem_of(error)}): {cure_of(problem_of(error))}."
        ) from None
    entries = [name for name in os.listdir(out) if not name.startswith(".")]
    if entries and NAME not in entries:
        raise UserError(
            f"--out is {escape(out)}, which holds {sorted(entries)[0]!r} and no cache: choose an empty folder, or one that "
            "does not exist."
        )


def agreed(built: Built, options: CacheOptions) -> Manifest:
    """The manifest of the command, or of the cache in its folder that it goes on with, which may get more views.

    Raises:
        UserError: The folder holds another cache.
    """
    asked = built.manifest
    if not (options.out / NAME).exists():
        return asked
    found = read_manifest(options.out, unfinished=True)
    pairs = [(name, getattr(found, name), getattr(asked, name)) for name in _SAME]
    pairs += [("layout", found.layout.as_dict(), asked.layout.as_dict())]
    for name, before, now in pairs:
        before, now = json.loads(json.dumps([before, now]))
        if before != now:
            which = next((key for key in now if before.get(key) != now[key]), "") if isinstance(now, dict) else ""
            shown = (before.get(which), now[which]) if which else (before, now)
            raise UserError(
                f"--out is {escape(options.out)}, which holds a cache whose {which or name} is {shown[0]}, and this command "
                f"has {shown[1]}: give the same command as before, or another --out."
            )
    views = max(found.views, asked.views)
    return dataclasses.replace(found, views=views, complete=found.complete and views == found.views)


def begin(built: Built, manifest: Manifest, gate: dict[str, float], out: Path) -> Manifest:
    """Writes the weights of the last stage and the manifest; on rank 0."""
    path = out / LAST_STAGE
    try:
        if not path.exists() or digest_of(path) != manifest.last_stage:
            with written_aside(path) as partial:
                save_tensors(partial, {name: tensor.contiguous() for name, tensor in built.last_stage.items()})
            manifest = dataclasses.replace(manifest, last_stage=digest_of(path), gate=gate)
        manifest.write(out)
    except OSError as error:
        raise UserError(cannot_write(out, error)) from None
    return manifest


def complete(out: Path, manifest: Manifest) -> None:
    """Writes the whole manifest, from what is noted beside each shard; on rank 0.

    Raises:
        UserError: An image could be used in some views and not in others, or the disk fails.
    """
    shards: list[list[str]] = []
    # sample -> reason by the shard of each view in which it could not be used
    bad: dict[int, dict[tuple[int, int], str]] = {}
    for view in range(manifest.views):
        samples, _ = CacheSampler(manifest, [Batch(view, 0, 0, manifest.samples)]).indices(0, 0)
        shards.append([])
        for shard in range(manifest.shards_of_a_view):
            notes = json.loads(notes_path(shard_path(out, view, shard)).read_text())
            shards[-1].append(notes["digest"])
            for place, reason in notes["bad"].items():
                sample = int(samples[shard * manifest.shard_entries + int(place)])
                bad.setdefault(sample, {})[view, shard] = reason
    for sample, reasons in bad.items():
        # its disk was away for a while: other images were mixed with it, or with what takes its place, nobody knows which
        if len(reasons) < manifest.views:
            (view, shard), reason = next(iter(reasons.items()))
            raise UserError(
                f"image {sample} {reason} in {len(reasons)} of {manifest.views} views, and could be used in the others: mend "
                f"or remove it, and make another cache, or remove {escape(shard_path(out, view, shard))} and its like, and "
                "give the same command again."
            )
    listed = {sample: next(iter(reasons.values())) for sample, reasons in sorted(bad.items())}
    try:
        dataclasses.replace(manifest, shards=shards, bad=listed, complete=True).write(out)
    except OSError as error:
        raise UserError(cannot_write(out, error)) from None


def cannot_write(out: Path, error: OSError) -> str:
    """What a user reads where the disk of a cache fails."""
    return (
        f"the cache {escape(out)} cannot be written ({problem_of(error)}): {cure_of(problem_of(error))}; the same command then "
        "goes on where it ended."
    )


def check_room(folder: Path, needed: int) -> None:
    """Checks that a cache fits: a disk that is full after hours of a teacher's work is found at the start.

    Raises:
        UserError: The disk has less than `needed` bytes.
    """
    free = free_bytes(folder)
    if free is not None and free < needed:
        raise UserError(
            f"--out is on a disk with {format_decimal(free)} free, and the cache takes {format_decimal(needed)} more: free "
            "space on it, name another, or ask for fewer --views."
        )
