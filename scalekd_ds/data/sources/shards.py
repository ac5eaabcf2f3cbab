"""Images inside larger files, such as tars: each is one read at its offset."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scalekd_ds.data.sources.index import Index, cached, in_parallel
from scalekd_ds.data.sources.labels import encode_labels, labels_of
from scalekd_ds.errors import UserError, suggest

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MAX_SHARDS = 1_000_000


@dataclass(frozen=True)
class ShardSource:
    """Images inside shards.

    Attributes:
        root: The folder of the shards.
        files: The shards' paths.
        stats: (size, mtime_ns) of each when it was indexed.
        members: (n) names within the shards.
        shards: (n,) int32 position of each image's shard.
        offsets: (n,) int64 first byte of each image in its shard.
        lengths: (n,) int64 its bytes.
        labels: (n,) int64 positions in `classes`.
        classes: Names.
        sizes: (n, 2) int32 height and width, 0 where the header gives none.
    """

    root: Path
    files: list[str]
    stats: list[tuple[int, int]]
    members: list[str]
    shards: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray
    classes: list[str]
    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.members)

    def name(self, i: int) -> str:
        """`shard.tar:member`."""
        return f"{self.files[self.shards[i]]}:{self.members[i]}"

    def read(self, i: int) -> np.ndarray:
        """(bytes,) uint8 of one image.

        Raises:
            OSError: The shard cannot be read, or is no longer the one that was indexed.
        """
        shard, length = int(self.shards[i]), int(self.lengths[i])
        # opened each time: a thousand shards of a set would be a thousand open files of each process
        fd = os.open(self.files[shard], os.O_RDONLY)
        try:
            stat = os.fstat(fd)
            if (stat.st_size, stat.st_mtime_ns) != self.stats[shard]:
                raise OSError(None, f"{self.files[shard]} has changed since this run indexed it")
            data = os.pread(fd, length, int(self.offsets[i]))
        finally:
            os.close(fd)
        if len(data) != length:
            raise OSError(None, f"{self.files[shard]} gave {len(data)} of {length} bytes")
        return np.frombuffer(data, dtype=np.uint8)

    def select(self, indices: Sequence[int] | np.ndarray) -> ShardSource:
        """These images alone, in this order."""
        chosen = np.asarray(indices, dtype=np.int64)
        return ShardSource(
            self.root,
            self.files,
            self.stats,
            [self.members[i] for i in chosen.tolist()],
            self.shards[chosen],
            self.offsets[chosen],
            self.lengths[chosen],
            self.labels[chosen],
            self.classes,
            self.sizes[chosen],
        )


@dataclass
class Sample:
    """One image of a shard: its name there, its label as it is written, (height, width), bytes and first byte."""

    name: str
    label: str
    size: tuple[int, int]
    length: int
    offset: int


def open_shards(
    where: Path,
    key: str,
    classes: list[str] | None,
    belongs: Callable[[Path], bool],
    scan: Callable[[str], list[Sample]],
) -> ShardSource:
    """Indexes shards of one kind, or reads the index that is kept of them.

    Args:
        where: A folder of shards, one shard, or a pattern such as `shard-{000..012}.tar`.
        key: What the user set to get here, for messages.
        classes: Names, for labels that are numbers; None takes a classes.txt beside the shards, or the labels.
        belongs: Whether a file of the folder is a shard.
        scan: All images of one shard.

    Raises:
        UserError: A shard is missing or what `scan` raises, or a label is out of range.
    """
    files = _expand(where, belongs, key)
    index = cached(where, key, lambda: _build(files, scan), lambda stamp: _changed(files, stamp))
    root = Path(files[0]).parent
    labels, classes = labels_of(index, root, classes, key, str(where))
    stats = [tuple(stat) for stat in index.stamp["stats"]]
    return ShardSource(
        root, files, stats, index.names, index.shards, index.offsets, index.lengths, labels, classes, index.sizes
    )


def _expand(where: Path, belongs: Callable[[Path], bool], key: str) -> list[str]:
    if where.is_dir():
        if any(entry.is_dir() and not entry.name.startswith(".") for entry in os.scandir(where)):
            raise UserError(
                f"{key}: {str(where)!r} has both shards and folders: name the shards, or a folder of one kind."
            )
        files = sorted(str(path) for path in where.iterdir() if belongs(path))
    else:
        files = [str(where)]
        while match := _RANGE.search(files[0]):
            first, last = match.groups()
            if not 0 <= int(last) - int(first) < _MAX_SHARDS:
                raise UserError(f"{key}: {str(where)!r} has the range {match[0]}: it must count up, as {{000..012}}.")
            numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
            files = [file.replace(match[0], number, 1) for file in files for number in numbers]
    for file in files:
        if not os.path.isfile(file):
            parent = Path(file).parent
            near = [path.name for path in parent.iterdir()] if parent.is_dir() else []
            raise UserError(f"{key}: the shard {file!r} does not exist.{suggest(Path(file).name, near)}")
    return files


def _stat(file: str) -> list[int]:
    stat = os.stat(file)
    return [stat.st_size, stat.st_mtime_ns]


def _changed(files: Sequence[str], stamp: dict) -> str | None:
    if stamp.get("shards") != [os.path.basename(file) for file in files]:
        return "the shards are others"
    for file, stat in zip(files, stamp["stats"], strict=True):
        if _stat(file) != stat:
            return f"{file!r} has changed"
    return None


def _build(files: Sequence[str], scan: Callable[[str], list[Sample]]) -> Index:
    # before they are read: a shard that changes meanwhile is then known to have
    stats = [_stat(file) for file in files]
    names: list[str] = []
    labels: list[str] = []
    rows: list[tuple[int, ...]] = []
    for shard, samples in enumerate(in_parallel(scan, files, f"shards of {Path(files[0]).parent}", chunk=1)):
        for sample in samples:
            names.append(sample.name)
            labels.append(sample.label)
            rows.append((shard, sample.offset, sample.length, *sample.size))
    table = np.array(rows, dtype=np.int64)
    codes, raw = encode_labels(labels)
    return Index(
        names=names,
        codes=codes,
        raw=raw,
        sizes=table[:, 3:].astype(np.int32),
        lengths=table[:, 2].copy(),
        offsets=table[:, 1].copy(),
        shards=table[:, 0].astype(np.int32),
        stamp={"shards": [os.path.basename(file) for file in files], "stats": stats},
    )
