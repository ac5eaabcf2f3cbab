"""Says what a cache holds, and reads the whole of it to name what is damaged."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from scalekd_ds.caching.sizes import describe
from scalekd_ds.errors import UserError
from scalekd_ds.names import escape
from scalekd_ds.process.console import readable_console
from scalekd_ds.teacher_cache.manifest import LAST_STAGE, read_manifest
from scalekd_ds.teacher_cache.shards import digest_of, shard_path

# files that are read at a time
_READERS = 4


def show(folder: Path) -> int:
    """Prints what a cache holds, also of an unfinished one."""
    manifest = read_manifest(folder, unfinished=True)
    print(f"{escape(folder)}: {describe(manifest)}")
    there = sum(
        shard_path(folder, view, shard).exists()
        for view in range(manifest.views)
        for shard in range(manifest.shards_of_a_view)
    )
    whole = manifest.views * manifest.shards_of_a_view
    rows = {
        "state": "complete" if manifest.complete else f"unfinished, {there} of {whole} shards are whole",
        "tokens": "none"
        if manifest.layout.tokens is None
        else "{} tokens of {} channels".format(*manifest.layout.tokens) + f", {manifest.layout.store}",
        "logits": _logits(manifest.layout.classes, manifest.layout.top),
        "entry": f"{manifest.layout.dtype.itemsize:,} bytes",
        "view seed": str(manifest.view_seed),
        "bad images": f"{len(manifest.bad):,}",
        "written by": f"scalekd_ds {manifest.release}",
        "digest of the teacher": str(manifest.digests.get("teacher_digest")),
        "digest of the images": str(manifest.data["digest"]),
    }
    rows |= {f"--{name}": str(value) for name, value in manifest.settings.items()}
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"  {name:<{width}}  {value}")
    for sample, reason in list(manifest.bad.items())[:20]:
        print(f"  image {sample} {reason}")
    return 0


def _logits(classes: int, top: int | None) -> str:
    if not classes:
        return "none"
    return f"all {classes}" if top is None else f"the largest {top} of {classes}, and the mass of the rest"


def verify(folder: Path) -> int:
    """Reads every shard, and names those that are not what was written; returns 1 where there is one.

    Raises:
        UserError: The folder holds no complete cache.
    """
    manifest = read_manifest(folder)
    wanted = {folder / LAST_STAGE: manifest.last_stage}
    for view, digests in enumerate(manifest.shards):
        wanted |= {shard_path(folder, view, shard): digest for shard, digest in enumerate(digests)}
    console = readable_console(stderr=True)
    columns = (TextColumn("verify"), BarColumn(), MofNCompleteColumn(), TextColumn("files"), TimeRemainingColumn())
    damaged = []
    with (
        ThreadPoolExecutor(_READERS) as pool,
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
    ):
        task = progress.add_task("verify", total=len(wanted))
        for (path, digest), found in zip(wanted.items(), pool.map(_digest, wanted), strict=True):
            progress.advance(task)
            if found != digest:
                damaged.append(
                    f"{escape(path)} {found if found.startswith('cannot') else 'is damaged: it holds other bytes'}"
                )
    for line in damaged:
        print(line)
    cure = "; remove them, and go on with the `scalekd cache` command that made it" if damaged else ""
    print(f"{escape(folder)}: {len(damaged)} of {len(wanted)} files are damaged{cure}")
    return 1 if damaged else 0


def _digest(path: Path) -> str:
    try:
        return digest_of(path)
    except UserError as error:
        return "cannot be read" + str(error).partition("cannot be read")[2].rstrip(".")
