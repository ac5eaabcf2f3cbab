"""Checks a whole data set by decoding it once, and keeps the list of images that a run leaves out (the quarantine)."""

from __future__ import annotations

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from scalekd_ds.data.sources.source import Source
from scalekd_ds.errors import UserError

QUARANTINE = "quarantine.tsv"
# images in one task of the thread pool
_CHUNK = 64


def find_flaws(source: Source, workers: int | None = None) -> dict[str, str]:
    """Decodes every image with Pillow and DALI, with a progress bar on a terminal.

    Args:
        source: The images.
        workers: Number of threads; None is one for each core. Decoders release the interpreter lock.

    Returns:
        Name -> reason of every image that cannot be decoded.
    """
    # DALI is slow to import, and only this function needs it
    from scalekd_ds.data.reader import find_undecodable

    chunks = [range(first, min(first + _CHUNK, len(source))) for first in range(0, len(source), _CHUNK)]
    console = Console(stderr=True)
    columns = (TextColumn("verify"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    flaws: dict[str, str] = {}
    with (
        ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool,
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
    ):
        task = progress.add_task("verify", total=len(source))
        for chunk, found in zip(chunks, pool.map(lambda chunk: find_undecodable(source, chunk), chunks), strict=True):
            flaws |= {source.name(index): reason for index, reason in found.items()}
            progress.advance(task, len(chunk))
    return flaws


def write_quarantine(folder: Path, flaws: dict[str, str]) -> Path:
    """Writes `folder`/quarantine.tsv, a line of path, tab and reason for each image; the file appears complete.

    Args:
        folder: The folder of the data set.
        flaws: Name -> reason, as `find_flaws` returns it; paths are written relative to `folder`.

    Returns:
        The path of the list.

    Raises:
        UserError: The list cannot be written.
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
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
    return path


def read_quarantine(folder: Path) -> dict[str, str]:
    """Reads `folder`/quarantine.tsv as path -> reason; the result is empty where there is no such file.

    Raises:
        UserError: A line has no tab, or names a path outside of the folder.
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


def without_quarantined(source: Source, folder: Path) -> Source:
    """The source without the images that the quarantine list in `folder` names, in the same order.

    Raises:
        UserError: A class has no image left, or the list is not valid.
    """
    listed = read_quarantine(folder)
    if not listed:
        return source
    keep = np.array([os.path.normpath(source.name(i)) not in listed for i in range(len(source))], dtype=bool)
    left = np.bincount(source.labels[keep], minlength=len(source.classes))
    emptied = (left == 0) & (np.bincount(source.labels, minlength=len(source.classes)) > 0)
    if emptied.any():
        name = source.classes[int(emptied.argmax())]
        raise UserError(
            f"every image of class {name!r} in {source.root} is in {folder / QUARANTINE}: mend some of them."
        )
    return source.select(np.flatnonzero(keep))
