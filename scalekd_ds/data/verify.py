"""Decoding a whole data set once, in parallel, and the quarantine list that comes of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from scalekd_ds.data.source import ImageFolder
from scalekd_ds.errors import UserError

QUARANTINE = "quarantine.tsv"
_CHUNK = 64


def _flaws(paths: Sequence[str]) -> dict[str, str]:
    # imported in the worker: DALI is slow to load, and the parent does not need it
    from scalekd_ds.data.reader import undecodable

    return undecodable(paths)


def find_flaws(paths: Sequence[str], workers: int | None = None) -> dict[str, str]:
    """Path -> reason of every file that Pillow or DALI cannot decode whole, with a progress bar on a terminal.

    Args:
        paths: The files.
        workers: Processes; None is one a core.
    """
    workers = workers or len(os.sched_getaffinity(0))
    chunks = [paths[i : i + _CHUNK] for i in range(0, len(paths), _CHUNK)]
    console = Console(stderr=True)
    columns = (TextColumn("verify"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    flaws: dict[str, str] = {}
    # spawned: DALI's threads do not survive a fork
    with (
        ProcessPoolExecutor(min(workers, len(chunks)), mp_context=get_context("spawn")) as pool,
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
    ):
        task = progress.add_task("verify", total=len(paths))
        for chunk, found in zip(chunks, pool.map(_flaws, chunks), strict=True):
            flaws |= found
            progress.advance(task, len(chunk))
    return flaws


def write_quarantine(folder: Path, flaws: dict[str, str]) -> Path:
    """Writes `folder`/quarantine.tsv, a path below `folder` and a reason a line; aside, synced, renamed.

    Raises:
        UserError: The folder cannot be written to.
    """
    path = folder / QUARANTINE
    aside = path.with_name(f".{QUARANTINE}.{os.getpid()}")
    lines = [f"{os.path.relpath(name, folder)}\t{' '.join(reason.split())}\n" for name, reason in sorted(flaws.items())]
    try:
        with aside.open("w") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be written: {error.strerror}.") from None
    return path


def read_quarantine(folder: Path) -> dict[str, str]:
    """Path -> reason from `folder`/quarantine.tsv; empty where there is none.

    Raises:
        UserError: A line without a tab, or a path outside of the folder.
    """
    path = folder / QUARANTINE
    if not path.is_file():
        return {}
    listed = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        name, tab, reason = line.partition("\t")
        if not tab or os.path.isabs(name) or os.path.normpath(name).startswith(".."):
            raise UserError(
                f"{path}, line {number}, is {line[:80]!r}: it must be a path below the folder, a tab, a reason."
            )
        listed[os.path.normpath(os.path.join(folder, name))] = reason
    return listed


def without_quarantined(source: ImageFolder, folder: Path) -> ImageFolder:
    """The source without the files that `folder`'s quarantine lists, in the same order.

    Raises:
        UserError: A class has nothing left, or the list cannot be read.
    """
    listed = read_quarantine(folder)
    if not listed:
        return source
    keep = np.array([os.path.normpath(path) not in listed for path in source.paths], dtype=bool)
    left = np.bincount(source.labels[keep], minlength=len(source.classes))
    if (left == 0).any():
        name = source.classes[int((left == 0).argmax())]
        raise UserError(f"every image of class {name!r} in {source.root} is in {folder / QUARANTINE}: mend them first.")
    paths = [path for path, kept in zip(source.paths, keep, strict=True) if kept]
    return ImageFolder(source.root, paths, source.labels[keep], source.classes)
