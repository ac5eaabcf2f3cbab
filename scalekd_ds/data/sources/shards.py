"""Images inside larger files (shards), such as tars: an image is read at its offset in one call."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from scalekd_ds.data.sources.index import Index, cached_index, open_file, parallel_map
from scalekd_ds.data.sources.labels import encode_labels, labels_of
from scalekd_ds.data.sources.what_counts import NO_SHARDS, add_up, is_left_by_systems, say_left_out
from scalekd_ds.errors import UserError, suggest
from scalekd_ds.names import escape

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MAX_SHARDS = 1_000_000
# what is read beside shards
_OF_OURS = ("classes.txt", "quarantine.tsv")
# blocks of a shard that are compared, and their bytes
_BLOCKS, _BLOCK = 16, 4096
# bytes of all shards together up to which they are compared as a whole, a tenth of a second of reading
_WHOLE = 64 * 2**20


@dataclass(frozen=True)
class ShardSource:
    """Images inside shards; a `Source`.

    Attributes:
        root: The folder of the shards.
        files: The shards' paths.
        stats: (bytes, mtime_ns) of each shard when it was indexed.
        members: (n,) names of the images within their shards.
        shards: (n,) int32 position of each image's shard.
        offsets: (n,) int64 first byte of each image in its shard.
        lengths: (n,) int64 encoded bytes of each image.
        labels: (n,) int64 positions in `classes`.
        classes: Names of the classes.
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

    def __len__(self) -> int:
        return len(self.members)

    def name(self, i: int) -> str:
        """The name of an image in messages, `shard.tar:member`."""
        return f"{self.files[self.shards[i]]}:{self.members[i]}"

    def read(self, i: int) -> np.ndarray:
        """The encoded bytes of one image, (bytes,) uint8.

        Raises:
            OSError: The shard cannot be read, or has changed since it was indexed.
        """
        shard, length = int(self.shards[i]), int(self.lengths[i])
        # opened for each read: each process would else hold as many open files as the set has shards
        fd = open_file(self.files[shard])
        try:
            stat = os.fstat(fd)
            if (stat.st_size, stat.st_mtime_ns) != self.stats[shard]:
                raise OSError(None, f"{escape(self.files[shard])} has changed since this run indexed it")
            data = os.pread(fd, length, int(self.offsets[i]))
        finally:
            os.close(fd)
        if len(data) != length:
            raise OSError(None, f"{escape(self.files[shard])} gave {len(data)} of {length} bytes")
        return np.frombuffer(data, dtype=np.uint8)

    def select(self, indices: Sequence[int] | np.ndarray) -> ShardSource:
        """A source with only these images, in this order."""
        chosen = np.asarray(indices, dtype=np.int64)
        return replace(
            self,
            members=[self.members[i] for i in chosen.tolist()],
            shards=self.shards[chosen],
            offsets=self.offsets[chosen],
            lengths=self.lengths[chosen],
            labels=self.labels[chosen],
        )


@dataclass
class Sample:
    """One image of a shard, as a scan finds it.

    Attributes:
        name: Name within the shard.
        label: Label as the shard writes it.
        length: Encoded bytes.
        offset: First byte in the shard.
    """

    name: str
    label: str
    length: int
    offset: int


def open_shards(
    where: Path,
    key: str,
    classes: list[str] | None,
    is_shard: Callable[[Path], bool],
    scan: Callable[[str], tuple[list[Sample], dict[str, int]]],
    of_folders: Callable[[], bool] = lambda: False,
) -> ShardSource:
    """Opens shards of one kind; their index is built, or read where an earlier run kept it.

    Args:
        where: A folder of shards, one shard, or a pattern such as `shard-{000..012}.tar`.
        key: Setting that names the source, for error messages.
        classes: Names of the classes; None takes them from a classes.txt beside the shards, or from the labels.
        is_shard: Whether a file in the folder is a shard.
        scan: Finds all images of one shard, and counts what is left out of it.
        of_folders: Whether labels are names of folders, asked after the scans.

    Raises:
        UserError: A shard is missing, `scan` refuses one, or a label is out of range.
    """
    files = _shard_paths(where, is_shard, key)
    index = cached_index(
        where, key, lambda: _build_index(files, scan, of_folders), lambda stamp: _what_changed(files, stamp)
    )
    beside = _beside_shards(where, files) if where.is_dir() else {}
    say_left_out(add_up([index.stamp["left_out"], beside]), key, str(where))
    root = Path(files[0]).parent
    labels, classes = labels_of(index, root, classes, key, escape(where))
    stats = [tuple(stat) for stat in index.stamp["stats"]]
    return ShardSource(root, files, stats, index.names, index.shards, index.offsets, index.lengths, labels, classes)


def _shard_paths(where: Path, is_shard: Callable[[Path], bool], key: str) -> list[str]:
    """The paths of the shards in a folder or of a pattern, in order; raises UserError for a missing one."""
    if where.is_dir():
        if any(entry.is_dir() and not is_left_by_systems(entry.name) for entry in os.scandir(where)):
            raise UserError(
                f"{key}: {str(where)!r} has both shards and folders: name the shards, or a folder of one kind."
            )
        files = sorted(str(path) for path in where.iterdir() if is_shard(path))
    else:
        files = shards_of_pattern(str(where), key)
    for file in files:
        if not os.path.isfile(file):
            parent = Path(file).parent
            near = [path.name for path in parent.iterdir()] if parent.is_dir() else []
            # what shells and WebDataset know besides
            other = re.search(r"[*?\[{]|::|^[a-z]+:", str(where)) and not _RANGE.search(str(where))
            hint = (
                " A pattern has ranges such as {000..012}; a folder of shards stands for all of them." if other else ""
            )
            raise UserError(f"{key}: the shard {file!r} does not exist.{hint or suggest(Path(file).name, near)}")
    return files


def _beside_shards(folder: Path, files: Sequence[str]) -> dict[str, int]:
    """What lies beside the shards of a folder and is left out, by kind; lists of classes and of places are not data."""
    counts: Counter[str] = Counter()
    shards = set(map(os.path.basename, files))
    for name in os.listdir(folder):
        if name not in shards and name not in _OF_OURS and not is_left_by_systems(name) and not name.endswith(".idx"):
            counts[NO_SHARDS] += 1
    return dict(counts)


def shards_of_pattern(where: str, key: str) -> list[str]:
    """The paths that a pattern such as `shard-{000..012}.tar` stands for, in order; a path without one is itself.

    What exists is a name and no pattern, such as a folder with braces in its own.

    Raises:
        UserError: A range does not count up, or is too long.
    """
    where = str(Path(where))
    literal = next((str(path) for path in (Path(where), *Path(where).parents) if os.path.exists(path)), ".")
    literal = "" if literal == "." else literal
    files = [where]
    while match := _RANGE.search(files[0], len(literal)):
        first, last = match.groups()
        if not 0 <= int(last) - int(first) < _MAX_SHARDS:
            raise UserError(f"{key}: {where!r} has the range {match[0]}: it must count up, as {{000..012}}.")
        numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
        files = [_replaced(file, match[0], number, len(literal)) for file in files for number in numbers]
    return files


def _replaced(file: str, old: str, new: str, start: int) -> str:
    return file[:start] + file[start:].replace(old, new, 1)


def _stat(file: str) -> list[int]:
    """[bytes, mtime_ns] of a file."""
    stat = os.stat(file)
    return [stat.st_size, stat.st_mtime_ns]


def _digest(file: str, most: int) -> str:
    """A digest of a shard of at most `most` bytes, or of blocks that are spread over it, its first and its last among them.

    Shards that were unpacked from an archive or an image of a disk may have the size and the time of other ones. Images are
    compressed, so that other data differ in nearly every block; a thousand shards take a second on a local disk. Where
    labels alone may differ a block need not show it: of a small set all bytes are compared.
    """
    digest = hashlib.blake2b(digest_size=12)
    fd = open_file(file)
    try:
        size = os.fstat(fd).st_size
        if size <= most:
            places: Sequence[int] = range(0, size, _BLOCK)
        else:
            places = sorted({max(0, size - _BLOCK) * i // (_BLOCKS - 1) for i in range(_BLOCKS)})
        for place in places:
            digest.update(os.pread(fd, _BLOCK, place))
    finally:
        os.close(fd)
    return digest.hexdigest()


def _what_changed(files: Sequence[str], stamp: dict) -> str | None:
    """What changed in the shards since the stamp was taken, or None."""
    if stamp.get("shards") != [os.path.basename(file) for file in files]:
        return "the shards are others"
    what = f"shards of {Path(files[0]).parent}"
    most = _WHOLE // len(files)
    now = parallel_map(lambda file: (_stat(file), _digest(file, most)), files, what, 16)
    for file, stat, digest, (stat_now, digest_now) in zip(files, stamp["stats"], stamp["digests"], now, strict=True):
        if stat != stat_now or digest != digest_now:
            return f"{file!r} has changed"
    return None


def _build_index(
    files: Sequence[str], scan: Callable[[str], tuple[list[Sample], dict[str, int]]], of_folders: Callable[[], bool]
) -> Index:
    # taken before the shards are read, so that a change while they are read is noticed later
    stats = [_stat(file) for file in files]
    what, most = f"shards of {Path(files[0]).parent}", _WHOLE // len(files)
    digests = list(parallel_map(lambda file: _digest(file, most), files, what, 16))
    left_out: list[dict[str, int]] = []
    names: list[str] = []
    labels: list[str] = []
    rows: list[tuple[int, ...]] = []
    for shard, (samples, left) in enumerate(parallel_map(scan, files, f"shards of {Path(files[0]).parent}", chunk=1)):
        left_out.append(left)
        for sample in samples:
            names.append(sample.name)
            labels.append(sample.label)
            rows.append((shard, sample.offset, sample.length))
    table = np.array(rows, dtype=np.int64)
    codes, raw = encode_labels(labels)
    return Index(
        names=names,
        codes=codes,
        raw=raw,
        lengths=table[:, 2].copy(),
        offsets=table[:, 1].copy(),
        shards=table[:, 0].astype(np.int32),
        stamp={
            "shards": [os.path.basename(file) for file in files],
            "stats": stats,
            "digests": digests,
            "left_out": add_up(left_out),
            "of_folders": of_folders(),
        },
    )
