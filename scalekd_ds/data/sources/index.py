"""The index of a source: what there is, built once by threads, kept beside the data and never used once it is stale."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import sys
import uuid
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SUFFIX = ".scalekd_index.npz"
VERSION = 1
_HEAD = 16 * 1024
_ARRAYS = ("codes", "sizes", "lengths", "offsets", "shards")
# threads wait for storage, not for a core: a network file system answers many at once
_THREADS = 16
_CHUNK = 256

T = TypeVar("T")
R = TypeVar("R")


@dataclass
class Index:
    """All images of a source, in order.

    Attributes:
        names: Of each image, relative to the source.
        codes: (n,) int64, each image's position in `raw`.
        raw: Labels as they are written, each once: names of classes, or numbers.
        sizes: (n, 2) int32 height and width, 0 where the header gives none.
        lengths: (n,) int64 encoded bytes, 0 where unknown.
        offsets: (n,) int64 first byte in the shard; 0 where each image is a file.
        shards: (n,) int32 position of each image's shard; 0 where each image is a file.
        stamp: What staleness is told by: plain values that survive JSON.
    """

    names: list[str]
    codes: np.ndarray
    raw: list[str]
    sizes: np.ndarray
    lengths: np.ndarray
    offsets: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    shards: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    stamp: dict = field(default_factory=dict)


def reason(error: Exception) -> str:
    """What went wrong in one line, without the path that the message has already."""
    return getattr(error, "strerror", None) or " ".join(str(error).split())


def image_size(fd: int, offset: int, length: int) -> tuple[int, int]:
    """(height, width) from an image's header, without reading its pixels; (0, 0) where it gives none."""
    for count in (min(_HEAD, length), length):
        try:
            with Image.open(io.BytesIO(os.pread(fd, count, offset))) as image:
                return image.height, image.width
        # Pillow's plugins raise much besides OSError on damaged headers; whoever decodes the image names it
        except Exception:
            if count == length:
                break
    return 0, 0


def file_size(path: str) -> tuple[int, int, int]:
    """(height, width, bytes) of an image file, 0 where unknown."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        return 0, 0, 0
    try:
        length = os.fstat(fd).st_size
        return (*image_size(fd, 0, length), length)
    except OSError:
        return 0, 0, 0
    finally:
        os.close(fd)


def in_parallel(function: Callable[[T], R], items: Sequence[T], what: str, chunk: int = _CHUNK) -> Iterator[R]:
    """`function` of each item by threads, in order, with a bar on a terminal.

    Args:
        function: Run by several threads at once.
        items: Its arguments.
        what: Beside the bar.
        chunk: Items of one task: a task for each of a million files would cost more than the files.
    """
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    quiet = not sys.stderr.isatty()
    with (
        ThreadPoolExecutor(_THREADS, thread_name_prefix="index") as pool,
        Progress(*columns, console=Console(stderr=True), transient=True, disable=quiet) as bar,
    ):
        task = bar.add_task(what, total=len(items))
        starts = range(0, len(items), chunk)
        try:
            for done in pool.map(lambda start: [function(item) for item in items[start : start + chunk]], starts):
                yield from done
                bar.advance(task, len(done))
        finally:
            # after an error the rest of a million files is not waited for
            pool.shutdown(wait=True, cancel_futures=True)


def cached(data: Path, key: str, build: Callable[[], Index], stale: Callable[[dict], str | None]) -> Index:
    """The index from its file, or built and written there.

    Processes that come at once wait for the first to build it; where the file system has no locks each builds the
    same, and the last rename wins.

    Args:
        data: What is indexed: a folder, a file, or a pattern of files.
        key: What the user set to get here, for messages.
        build: Makes the index, its `stamp` included; the stamp must be taken before the data is read.
        stale: Why the data is no longer what a stamp says, or None.
    """
    places = _places(data)
    index, why = _load(places, stale)
    if index is not None:
        return index
    with _locked(places) as alone:
        if alone:
            # another process may have built it while this one waited
            index, why = _load(places, stale)
            if index is not None:
                return index
        if why:
            print(f"{key}: the index of {data} is stale ({why}): building it again", file=sys.stderr)
        index = build()
        _store(index, places, key, data)
    return index


def _places(data: Path) -> list[Path]:
    """Where the index of `data` may be, the preferred place first."""
    beside = data / SUFFIX if data.is_dir() else data.with_name(f".{data.name}{SUFFIX}")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scalekd_ds"
    digest = hashlib.sha256(os.fsencode(os.path.abspath(data))).hexdigest()[:32]
    return [beside, home / f"{digest}.npz"]


def _load(places: Iterable[Path], stale: Callable[[dict], str | None]) -> tuple[Index | None, str | None]:
    why = None
    for place in places:
        try:
            index = _read(place)
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            why = why or f"{place} cannot be read: {reason(error)}"
            continue
        changed = stale(index.stamp)
        if changed is None:
            return index, None
        why = why or changed
    return None, why


def _read(place: Path) -> Index:
    with np.load(place, allow_pickle=False) as file:
        head = json.loads(file["head"].tobytes())
        if head["version"] != VERSION:
            raise ValueError(f"it has format {head['version']}, and this release has {VERSION}")
        arrays = {name: file[name] for name in _ARRAYS}
        # names of files have every byte but this one
        names = os.fsdecode(file["names"].tobytes()).split("\0")
    if not len(names) == len(arrays["codes"]) == len(arrays["sizes"]):
        raise ValueError("its parts differ in length")
    return Index(names=names, raw=head["raw"], stamp=head["stamp"], **arrays)


def _store(index: Index, places: Sequence[Path], key: str, data: Path) -> None:
    head = json.dumps({"version": VERSION, "stamp": index.stamp, "raw": index.raw}).encode()
    texts = {"head": head, "names": os.fsencode("\0".join(index.names))}
    blobs = {name: np.frombuffer(text, dtype=np.uint8) for name, text in texts.items()}
    arrays = {name: getattr(index, name) for name in _ARRAYS}
    for place in places:
        aside = place.with_name(f"{place.name}.{uuid.uuid4().hex}")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with open(aside, "xb") as file:
                np.savez(file, **blobs, **arrays)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, place)
            return
        except OSError as error:
            failed = error
            with contextlib.suppress(OSError):
                aside.unlink()
    print(f"{key}: the index of {data} cannot be kept: {reason(failed)}; it is built at each start", file=sys.stderr)


@contextlib.contextmanager
def _locked(places: Iterable[Path]) -> Iterator[bool]:
    """Holds a lock while the index is built; False where no place takes one."""
    with contextlib.ExitStack() as held:
        for place in places:
            with contextlib.suppress(OSError):
                # the cache's folder may be new
                place.parent.mkdir(parents=True, exist_ok=True)
                file = held.enter_context(open(place.with_suffix(".lock"), "ab"))
                fcntl.flock(file, fcntl.LOCK_EX)
                break
        else:
            file = None
        yield file is not None
