"""Checks a whole data set by decoding it once, and keeps the list of images that a run leaves out (the quarantine)."""

from __future__ import annotations

import contextlib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from scalekd_ds.data.sources.source import Source
from scalekd_ds.errors import UserError
from scalekd_ds.names import escape, one_line, path_of, text_of, unescape
from scalekd_ds.process.console import readable_console

QUARANTINE = "quarantine.tsv"
# The first line of a list of which a name is escaped. Earlier versions, which had names as they are, take it for an image
# that is not there.
_ESCAPED = "#\tnames are as in $'...' of a shell: \\\\ \\n \\r \\t and \\xHH for a byte"
# images in one task of the thread pool
_CHUNK = 64


def find_flaws(source: Source, workers: int | None = None) -> dict[str, str]:
    """Decodes every image with Pillow, with a progress bar on a terminal.

    Args:
        source: The images.
        workers: Number of threads; None is one for each core. Decoders release the interpreter lock.

    Returns:
        Name -> reason of every image that cannot be decoded.
    """
    # it imports DALI, which is slow, and only this function needs it
    from scalekd_ds.data.reader import find_undecodable

    chunks = [range(first, min(first + _CHUNK, len(source))) for first in range(0, len(source), _CHUNK)]
    console = readable_console(stderr=True)
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

    Where a path cannot stand in a line as it is, all are escaped (`names.escape`), and a first line says so.

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
    named = {_below(name, folder): one_line(" ".join(reason.split())) for name, reason in sorted(flaws.items())}
    # a member of a tar may have '..' in its name, which no path in the list may
    shown = {name: re.sub(r"(?<![^/])\.\.(?![^/])", r"\\x2e.", escape(name)) for name in named}
    lines = [f"{shown[name]}\t{reason}\n" for name, reason in named.items()]
    if any(name != written for name, written in shown.items()):
        lines.insert(0, f"{_ESCAPED}\n")
    try:
        with aside.open("w", encoding="utf-8") as file:
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


def _below(name: str, folder: Path) -> str:
    """The name of an image below `folder`, by which the list knows it, however its path is written."""
    top = "" if folder == Path() else os.path.join(folder, "")
    below = name.removeprefix(top) if name.startswith(top) and not os.path.isabs(name[len(top) :]) else None
    return text_of(os.path.relpath(name, folder) if below is None else _plain(below))


def _plain(name: str) -> str:
    """The name of an image without '.' and '..', but for those in the name of a tar's member."""
    return name if ".." in name.partition(":")[2].split("/") else os.path.normpath(name)


def read_quarantine(folder: Path) -> dict[str, str]:
    """Reads `folder`/quarantine.tsv as path -> reason; the result is empty where there is no such file.

    Raises:
        UserError: The list cannot be read, a line has no tab, or one names a path outside of the folder.
    """
    return {os.path.join(folder, path_of(name)): reason for name, reason in _read(folder).items()}


def _read(folder: Path) -> dict[str, str]:
    """The list as name below the folder -> reason."""
    path = folder / QUARANTINE
    if not path.is_file():
        return {}
    try:
        lines = path.read_bytes().decode("utf-8", "surrogateescape").split("\n")
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read: {error.strerror}.") from None
    escaped = lines[0].rstrip("\r") == _ESCAPED
    listed = {}
    # what is behind the last newline is no line
    for number, line in enumerate(lines[:-1] if not lines[-1] else lines, 1):
        if escaped and number == 1:
            continue
        name, tab, reason = line.removesuffix("\r").partition("\t")
        if not tab or os.path.isabs(name) or os.path.normpath(name).split("/")[0] == "..":
            raise UserError(
                f"{str(path)!r}, line {number}, is {line[:80]!r}: it must be a path below the folder, a tab, a reason. "
                "`scalekd prepare-data verify` writes the list again."
            )
        if escaped:
            listed[_plain(unescape(name))] = reason
            continue
        # earlier versions wrote names as they are, with tabs: the reason has none, but one of a user's may
        parts = line.removesuffix("\r").split("\t")
        for end in range(1, len(parts)):
            listed[_plain("\t".join(parts[:end]))] = "\t".join(parts[end:])
    return listed


def without_quarantined(source: Source, folder: Path) -> Source:
    """The source without the images that the quarantine list in `folder` names, in the same order.

    Raises:
        UserError: A class has no image left, or the list is not valid.
    """
    listed = _read(folder)
    if not listed:
        return source
    keep = np.array([_below(source.name(i), folder) not in listed for i in range(len(source))], dtype=bool)
    left = np.bincount(source.labels[keep], minlength=len(source.classes))
    emptied = (left == 0) & (np.bincount(source.labels, minlength=len(source.classes)) > 0)
    if emptied.any():
        name = source.classes[int(emptied.argmax())]
        raise UserError(
            f"every image of class {name!r} in {str(source.root)!r} is in {str(folder / QUARANTINE)!r}: mend some of them."
        )
    return source.select(np.flatnonzero(keep))
