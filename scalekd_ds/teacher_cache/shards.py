"""Shards of a teacher cache: files of records that a kill cannot leave half written, and that go on where one was killed."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path

import numpy as np

from scalekd_ds.errors import UserError
from scalekd_ds.files.durable import sync, write_json
from scalekd_ds.teacher_cache.records import checksums, reasons_of

# bytes of a shard, about: large enough for disks and networks, small enough to lose or to copy
SHARD_BYTES = 10**9
# at least as many shards a view, so that several ranks share even a small set
_LEAST_SHARDS = 16
_BLOCK = 1 << 24


def shard_entries(samples: int, batch: int, record: int) -> int:
    """Entries of a shard: a multiple of the batch, so that no batch is in two, and a function of the cache alone.

    Args:
        samples: Images in a view.
        batch: Images that the teacher sees at a time.
        record: Bytes of an entry.
    """
    batches = -(-samples // batch)
    return batch * max(1, min(SHARD_BYTES // (record * batch), -(-batches // _LEAST_SHARDS)))


def shard_path(folder: Path, view: int, shard: int) -> Path:
    """Where a shard of a view is, in the folder of its cache."""
    return folder / f"view{view:04d}" / f"shard{shard:05d}.npy"


def header(dtype: np.dtype, count: int) -> bytes:
    """What numpy writes before `count` records."""
    out = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(out, described)
    return out.getvalue()


class ShardWriter:
    """Writes one shard, from where an earlier writer of it was killed; its file gets its name when it is whole.

    Args:
        path: Path of the shard, whose folder exists.
        dtype: Type of a record.
        count: Records of the whole shard.
        batch: Records are written in batches of this many from the first one on, of which half a one does not count.
        key: Start of the records' checksums.

    Attributes:
        done: Records that are there.
        bad: Place in the shard -> reason of the images that could not be used.

    Raises:
        OSError: The disk is full, fails or refuses, here and in all methods.
    """

    def __init__(self, path: Path, dtype: np.dtype, count: int, batch: int, key: int) -> None:
        self.path, self.dtype, self.count = path, dtype, count
        self._partial = path.with_name(f".{path.name}.partial")
        self._header = header(dtype, count)
        self._digest = hashlib.blake2b(self._header, digest_size=16)
        self.done = 0
        self.bad: dict[int, str] = {}
        self._file = open(self._partial, "r+b" if self._partial.exists() else "w+b")  # noqa: SIM115
        if self._file.read(len(self._header)) == self._header:
            self._find_whole_batches(batch, key)
        else:
            self._file.seek(0)
            self._file.write(self._header)
        self._file.truncate(len(self._header) + self.done * dtype.itemsize)
        self._file.seek(0, os.SEEK_END)

    def _find_whole_batches(self, batch: int, key: int) -> None:
        while self.done < self.count:
            wanted = min(batch, self.count - self.done)
            data = self._file.read(wanted * self.dtype.itemsize)
            records = np.frombuffer(data[: len(data) // self.dtype.itemsize * self.dtype.itemsize], self.dtype)
            if len(records) < wanted or (checksums(records, key) != records["checksum"]).any():
                break
            self._count(records, data)

    def _count(self, records: np.ndarray, data: bytes) -> None:
        self._digest.update(data)
        self.bad |= {self.done + place: reason for place, reason in reasons_of(records).items()}
        self.done += len(records)

    def append(self, records: np.ndarray) -> None:
        """Writes the next batch."""
        data = records.tobytes()
        self._file.write(data)
        self._count(records, data)

    def finish(self) -> None:
        """Gives the shard its name, once it is on the disk, and its digest and bad images are in a .json beside it."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        write_json(notes_path(self.path), {"digest": self._digest.hexdigest(), "bad": self.bad})
        self._partial.rename(self.path)
        sync(self.path.parent)

    def close(self) -> None:
        """Leaves the shard as it is, for another writer to go on with."""
        self._file.close()


def entries_done(path: Path, dtype: np.dtype, count: int, batch: int, key: int) -> int:
    """Records of an unfinished shard that are there; the arguments are those of `ShardWriter`. A whole one is finished.

    Raises:
        OSError: The disk fails or refuses.
    """
    if not path.with_name(f".{path.name}.partial").exists():
        return 0
    writer = ShardWriter(path, dtype, count, batch, key)
    if writer.done == count:
        writer.finish()
    writer.close()
    return writer.done


def notes_path(shard: Path) -> Path:
    """The file of what is known of a shard, beside it."""
    return shard.with_suffix(".json")


def digest_of(path: Path) -> str:
    """The digest that `ShardWriter.finish` has noted, of the file as it is now.

    Raises:
        UserError: The file cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        with path.open("rb") as file:
            while data := file.read(_BLOCK):
                digest.update(data)
    except OSError as error:
        raise UserError(f"{str(path)!r} of the teacher cache cannot be read: {error.strerror}.") from None
    return digest.hexdigest()
