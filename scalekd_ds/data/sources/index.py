"""The index of a source: what images it has and where.

It is built once, by threads, and kept in a file beside the data; a stale index is built again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import stat
import sys
import uuid
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from scalekd_ds.names import one_line, paths_in
from scalekd_ds.process.console import readable_console

SUFFIX = ".scalekd_index.npz"
VERSION = 4
_ARRAYS = ("codes", "lengths", "offsets", "shards")
# more threads than cores, because they wait for storage: a network file system serves many requests at once
_THREADS = 16
# items in one task of the thread pool
_CHUNK = 256

T = TypeVar("T")
R = TypeVar("R")


@dataclass
class Index:
    """All images of a source, in order.

    Attributes:
        names: Name of each image, relative to the source (`names.text_of`).
        codes: (n,) int64, each image's position in `raw`.
        raw: The distinct labels as the source writes them, names or numbers.
        lengths: (n,) int64 encoded bytes, 0 where unknown.
        offsets: (n,) int64 first byte in the shard; empty where each image is a file.
        shards: (n,) int32 position of each image's shard; empty where each image is a file.
        stamp: State of the data when it was indexed, by which a stale index is recognised; values that JSON can hold, whose
            texts are paths in this process's locale.
    """

    names: list[str]
    codes: np.ndarray
    raw: list[str]
    lengths: np.ndarray
    offsets: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    shards: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    stamp: dict = field(default_factory=dict)


def reason(error: Exception) -> str:
    """The message of an error in one line, without the path that an OSError adds."""
    return getattr(error, "strerror", None) or " ".join(str(error).split())


def open_file(path: str) -> int:
    """Opens a file for reading and returns its descriptor.

    Raises:
        OSError: It cannot be opened, or is a folder, a pipe or a device.
    """
    # opening a pipe that nobody writes to would wait for ever otherwise
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    raise OSError(None, "it is no file, but a folder, a pipe or a device")


def read_file(path: str) -> np.ndarray:
    """All bytes of a file, (bytes,) uint8.

    Raises:
        OSError: It cannot be read, or is a folder, a pipe or a device.
    """
    with open(open_file(path), "rb", buffering=0) as file:
        return np.frombuffer(file.read(), dtype=np.uint8)


def file_length(path: str) -> int:
    """The bytes of a file, 0 where they cannot be told."""
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def parallel_map(function: Callable[[T], R], items: Sequence[T], what: str, chunk: int = _CHUNK) -> Iterator[R]:
    """Results of `function` for each item, in order, computed by threads, with a progress bar on a terminal.

    Args:
        function: Function that several threads may call at once.
        items: Arguments of the calls.
        what: Text beside the progress bar.
        chunk: Items in one task of the thread pool; a task for each of a million files would cost more than the files.
    """
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    quiet = not sys.stderr.isatty()
    with (
        ThreadPoolExecutor(_THREADS, thread_name_prefix="index") as pool,
        Progress(*columns, console=readable_console(stderr=True), transient=True, disable=quiet) as bar,
    ):
        task = bar.add_task(one_line(what), total=len(items))
        starts = range(0, len(items), chunk)
        try:
            for done in pool.map(lambda start: [function(item) for item in items[start : start + chunk]], starts):
                yield from done
                bar.advance(task, len(done))
        finally:
            # after an error the tasks that have not begun are dropped
            pool.shutdown(wait=True, cancel_futures=True)


def cached_index(data: Path, key: str, build: Callable[[], Index], what_changed: Callable[[dict], str | None]) -> Index:
    """Reads the index of `data` from its file; builds it and writes the file where there is none or a stale one.

    Of several processes that need it at once, one builds the index and the others wait. Where the file system has no
    locks, each builds the same index, and the last one to rename its file wins.

    Args:
        data: A folder, a file, or a pattern of files.
        key: Setting that names the source, for messages.
        build: Makes the index with its stamp; the stamp must be taken before the data is read.
        what_changed: Says what changed in the data since a stamp was taken, or None.
    """
    paths = _index_paths(data)
    index, problem = _load(paths, what_changed)
    if index is not None:
        return index
    with _build_lock(paths) as locked:
        if locked:
            # another process may have built it while this one waited
            index, problem = _load(paths, what_changed)
            if index is not None:
                return index
        if problem:
            print(one_line(f"{key}: the index of {data} is stale ({problem}): building it again"), file=sys.stderr)
        index = build()
        _store(index, paths, key, data)
    return index


def _index_paths(data: Path) -> list[Path]:
    """Where the index of `data` may be: beside it, or in the user's cache where that cannot be written."""
    beside = data / SUFFIX if data.is_dir() else data.with_name(f".{data.name}{SUFFIX}")
    # a user without a home, as in a container that runs under any number, has no cache; a relative one would depend on
    # where a command is started, and the standard says to ignore it
    places = [os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache")]
    cache = next((place for place in places if os.path.isabs(place)), None)
    if cache is None:
        return [beside]
    digest = hashlib.sha256(os.fsencode(os.path.abspath(data))).hexdigest()[:32]
    return [beside, Path(cache) / "scalekd_ds" / f"{digest}.npz"]


def _load(paths: Iterable[Path], what_changed: Callable[[dict], str | None]) -> tuple[Index | None, str | None]:
    """The first index that is up to date, or the first reason why an existing one is not used."""
    problem = None
    for path in paths:
        try:
            index = _read(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            # the name of a table may have as many bytes as a name can have
            if error.errno != errno.ENAMETOOLONG:
                problem = problem or f"{path} cannot be read: {reason(error)}"
            continue
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            problem = problem or f"{path} cannot be read: {reason(error)}"
            continue
        changed = what_changed(index.stamp)
        if changed is None:
            return index, None
        problem = problem or changed
    return None, problem


def _read(path: Path) -> Index:
    with np.load(path, allow_pickle=False) as file:
        head = json.loads(file["head"].tobytes())
        if head["version"] != VERSION:
            raise ValueError(f"it has format {head['version']}, and this release has {VERSION}")
        arrays = {name: file[name] for name in _ARRAYS}
        # a file name may hold any byte but this one
        names = file["names"].tobytes().decode("utf-8", "surrogateescape").split("\0")
    if not len(names) == len(arrays["codes"]) == len(arrays["lengths"]):
        raise ValueError("its parts differ in length")
    return Index(names=names, raw=head["raw"], stamp=paths_in(head["stamp"]), **arrays)


def _store(index: Index, paths: Sequence[Path], key: str, data: Path) -> None:
    """Writes the index to the first path that takes it; a warning on stderr where none does."""
    head = json.dumps({"version": VERSION, "stamp": index.stamp, "raw": index.raw}).encode()
    texts = {"head": head, "names": "\0".join(index.names).encode("utf-8", "surrogateescape")}
    blobs = {name: np.frombuffer(text, dtype=np.uint8) for name, text in texts.items()}
    arrays: dict[str, Any] = {name: getattr(index, name) for name in _ARRAYS} | blobs
    for path in paths:
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "xb") as file:
                np.savez(file, **arrays)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            return
        except OSError as error:
            failed = error
            with contextlib.suppress(OSError):
                temporary.unlink()
    line = f"{key}: the index of {data} cannot be kept: {reason(failed)}; it is built at each start"
    print(one_line(line), file=sys.stderr)


@contextlib.contextmanager
def _build_lock(paths: Iterable[Path]) -> Iterator[bool]:
    """Holds a file lock, beside the first path that allows one; yields whether there is a lock."""
    with contextlib.ExitStack() as held:
        for path in paths:
            with contextlib.suppress(OSError):
                # the folder in the user's cache may not exist yet
                path.parent.mkdir(parents=True, exist_ok=True)
                file = held.enter_context(open(path.with_suffix(".lock"), "ab"))
                fcntl.flock(file, fcntl.LOCK_EX)
                break
        else:
            file = None
        yield file is not None
