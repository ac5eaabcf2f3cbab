"""Reads a teacher cache: the entries of a batch, whichever shards they are in; threads and jobs may share a cache."""

from __future__ import annotations

import functools
import os
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from scalekd_ds.data.sampler import permutation
from scalekd_ds.errors import UserError
from scalekd_ds.names import escape, one_line
from scalekd_ds.teacher_cache.manifest import LAST_STAGE, Manifest, read_manifest
from scalekd_ds.teacher_cache.records import ABSENT, checksums, decode, unpack
from scalekd_ds.teacher_cache.shards import digest_of, header, shard_path

# shards that are open at a time
_MOST_OPEN = 64
# damaged entries that are named one by one
_MOST_NAMED = 10


class DamagedCacheError(UserError):
    """More of a teacher cache is damaged than a run goes on with."""


class TeacherCache:
    """A teacher cache that is complete.

    It is read entry by entry, wherever these lie, and those that lie together by one read: memory does not depend on the
    number of images but for 8 bytes an image and view in use, of which two views are kept.

    Args:
        folder: The folder that `scalekd cache` has written.
        max_bad_share: Largest share of the entries that may be damaged; each is replaced by another view of its image.

    Attributes:
        manifest: What the cache is of.
        seconds: Time that was spent on reading, in all threads.
        damaged: (sample, view) -> reason of the entries that cannot be used.
        last_view: The view that was read last.

    Raises:
        UserError: The folder holds no cache, or one that is unfinished, of a newer release, or lacks a shard.
    """

    def __init__(self, folder: str | Path, max_bad_share: float = 0.001) -> None:
        self.folder = Path(folder)
        self.manifest: Manifest = read_manifest(self.folder)
        self.layout, self._dtype = self.manifest.layout, self.manifest.layout.dtype
        self.max_bad_share = max_bad_share
        self.seconds = 0.0
        self.damaged: dict[tuple[int, int], str] = {}
        self.last_view = 0
        self._lock = threading.Lock()
        self._place = functools.lru_cache(2)(self._places)
        self._open = functools.lru_cache(_MOST_OPEN)(_Shard)
        # of JSON and of numpy's text, which would take longer to make for each read than the read
        self._key = functools.lru_cache(_MOST_OPEN)(self.manifest.key)
        self._header_bytes = functools.lru_cache(2)(lambda count: len(header(self._dtype, count)))
        self._check_shards()

    def _check_shards(self) -> None:
        """Compares the length of each shard with what it must be: a copy that was cut off is found before the first step."""
        for view in range(self.manifest.views):
            for shard in range(self.manifest.shards_of_a_view):
                path = shard_path(self.folder, view, shard)
                count = self.manifest.entries_of(shard)
                wanted = self._header_bytes(count) + count * self._dtype.itemsize
                try:
                    found = path.stat().st_size
                except OSError as error:
                    raise UserError(
                        f"{escape(path)} of the teacher cache cannot be read ({error.strerror}): bring it back from a copy, or "
                        "go on with the `scalekd cache` command that made it, which makes what is missing."
                    ) from None
                if found != wanted:
                    raise UserError(
                        f"{escape(path)} of the teacher cache has {found:,} bytes and must have {wanted:,}: bring it back from "
                        "a copy, or remove it and go on with the `scalekd cache` command that made it."
                    )

    # -- what a loader calls ---------------------------------------------------------------------------------------

    @property
    def bad(self) -> Mapping[int, str]:
        """Sample -> reason of the images that have no entries, since they could not be used when the cache was made."""
        return self.manifest.bad

    def take(self, indices: np.ndarray, views: np.ndarray) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
        """The entries of a batch.

        Args:
            indices: (B,) samples, none of which is in `bad`.
            views: (B,) views.

        Returns:
            (B,) the views that were taken, other ones where an entry is damaged; and the fields of the entries, of B rows
            each, on the host, for `targets`.

        Raises:
            DamagedCacheError: Too many entries are damaged.
        """
        begin = time.perf_counter()
        views = np.array(
            [self._usable(i, v) for i, v in zip(indices.tolist(), views.tolist(), strict=True)], dtype=np.int64
        )
        records = np.empty(len(indices), self._dtype)
        rest = np.arange(len(indices))
        while len(rest):
            records[rest] = self._read(indices[rest], views[rest])
            intact = np.ones(len(rest), dtype=bool)
            for view in np.unique(views[rest]).tolist():
                here = views[rest] == view
                found = records[rest[here]]
                intact[here] = (checksums(found, self._key(view)) == found["checksum"]) & (
                    found["sample"] == indices[rest[here]]
                )
            rest = rest[~intact]
            for place in rest.tolist():
                index, view = int(indices[place]), int(views[place])
                absent = records["sample"][place] == ABSENT
                self.mark(
                    index,
                    view,
                    "has no answer there" if absent else f"is damaged in {escape(self._path_of(index, view))}",
                )
                views[place] = self._usable(index, view)
        with self._lock:
            self.seconds += time.perf_counter() - begin
            if len(views):
                self.last_view = int(views[-1])
        return views, unpack(self.layout, records)

    def colours(self, indices: np.ndarray, views: np.ndarray) -> np.ndarray:
        """(B, 3) the mean of each colour over the pixels of the views that the teacher has seen, normalised."""
        return self._read(indices, views)["colour"]

    def mark(self, index: int, view: int, reason: str) -> None:
        """Notes that an entry cannot be used, and says so the first few times.

        Raises:
            DamagedCacheError: Too many cannot.
        """
        with self._lock:
            if (index, view) in self.damaged:
                return
            self.damaged[index, view] = reason
            count = len(self.damaged)
        total = self.manifest.samples * self.manifest.views
        if count > max(1.0, self.max_bad_share * total):
            first = next(iter(self.damaged.items()))
            raise DamagedCacheError(
                f"{count} of {total:,} entries of the teacher cache {escape(self.folder)} cannot be used, more than "
                f"data.max_bad_share {self.max_bad_share:g} allows (sample {first[0][0]} in view {first[0][1]} {first[1]}): "
                "`scalekd cache --verify` names the damaged shards; remove them, and go on with the command that made it."
            )
        if count <= _MOST_NAMED:
            line = (
                f"warning: teacher cache: sample {index} in view {view} {reason}; another of its views takes its place"
            )
            print(one_line(line), file=sys.stderr)

    def targets(self, entries: dict[str, torch.Tensor]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Tokens (B, P, C) and logits (B, K) of what `take` gave, float32 on its device; None for what the cache lacks."""
        return decode(self.layout, entries)

    # -- where entries are -----------------------------------------------------------------------------------------

    def _usable(self, index: int, view: int) -> int:
        """`view`, or the next one of this sample that is not known to be damaged."""
        views = self.manifest.views
        if not 0 <= view < views:
            raise ValueError(f"view is {view}: this cache has the views 0 to {views - 1}.")
        for step in range(views):
            if (index, (view + step) % views) not in self.damaged:
                return (view + step) % views
        raise DamagedCacheError(
            f"no view of sample {index} in the teacher cache {escape(self.folder)} can be used ({self.damaged[index, view]}): "
            "`scalekd cache --verify` names the damaged shards; remove them, and go on with the command that made it."
        )

    def _places(self, view: int) -> np.ndarray:
        """(samples,) the place of each sample among the entries of a view."""
        order = permutation(self.manifest.order_seed, view, self.manifest.samples)
        places = np.empty_like(order)
        places[order] = np.arange(len(order))
        return places

    def _path_of(self, index: int, view: int) -> Path:
        return shard_path(self.folder, view, int(self._place(view)[index]) // self.manifest.shard_entries)

    def _read(self, indices: np.ndarray, views: np.ndarray) -> np.ndarray:
        """(B,) the records as they are on the disk."""
        records = np.zeros(len(indices), self._dtype)
        per_shard = self.manifest.shard_entries
        places = np.array(
            [self._place(v)[i] for i, v in zip(indices.tolist(), views.tolist(), strict=True)], dtype=np.int64
        )
        order = np.lexsort((places, views))
        # entries that follow each other in a shard are read at once, as those of a whole batch do in the order of training
        runs = np.flatnonzero(
            (np.diff(places[order]) != 1) | (np.diff(views[order]) != 0) | (places[order][1:] % per_shard == 0)
        )
        for run in np.split(order, runs + 1):
            if not len(run):
                continue
            first, view = int(places[run[0]]), int(views[run[0]])
            path = shard_path(self.folder, view, first // per_shard)
            start = self._header_bytes(self.manifest.entries_of(first // per_shard))
            try:
                data = self._open(path).read(
                    start + first % per_shard * self._dtype.itemsize, len(run) * self._dtype.itemsize
                )
            except OSError as error:
                raise UserError(
                    f"{escape(path)} of the teacher cache cannot be read any more ({error.strerror}): is its disk or mount "
                    "gone? Once it is back, --run.resume auto goes on from the last checkpoint."
                ) from None
            whole = len(data) // self._dtype.itemsize
            # what is cut off has no checksum that fits
            records[run[:whole]] = np.frombuffer(data, self._dtype, whole)
        return records

    # -- beside the entries ----------------------------------------------------------------------------------------

    def last_stage(self) -> dict[str, torch.Tensor]:
        """The weights of the teacher's last stage, by the model's own names.

        Raises:
            UserError: Their file is damaged or gone.
        """
        from safetensors.torch import load_file

        path = self.folder / LAST_STAGE
        if digest_of(path) != self.manifest.last_stage:
            raise UserError(
                f"{escape(path)} of the teacher cache is damaged: bring it back from a copy, or make the cache anew."
            )
        return load_file(path)


class _Shard:
    """An open shard, closed when nobody refers to it any more."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, offset: int, count: int) -> bytes:
        return os.pread(self._file, count, offset)

    def __del__(self) -> None:
        # where the file could not be opened there is none
        if hasattr(self, "_file"):
            os.close(self._file)
