"""Writes the entries of a rank's shards while the teacher computes the next ones."""

from __future__ import annotations

import contextlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scalekd_ds.caching.folder import cannot_write
from scalekd_ds.caching.order import Batch
from scalekd_ds.errors import UserError
from scalekd_ds.teacher_cache.manifest import Manifest
from scalekd_ds.teacher_cache.records import encode, pack, to_numpy
from scalekd_ds.teacher_cache.shards import ShardWriter, shard_path

# batches that wait to be written: their memory is bounded, and a disk that stalls for a moment stalls no teacher
_MOST_WAITING = 4


class EntryWriter:
    """Packs and writes batches of entries in a thread of its own; use as a context manager.

    Args:
        folder: Folder of the cache.
        manifest: What the cache is of.
        device: Device of the teacher.
    """

    def __init__(self, folder: Path, manifest: Manifest, device: torch.device) -> None:
        self.folder, self.manifest, self.device = folder, manifest, device
        self._pool = ThreadPoolExecutor(1, "write-entries")
        self._waiting: deque[Future] = deque()
        self._shard: ShardWriter | None = None

    def __enter__(self) -> EntryWriter:
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        failed = True
        try:
            if kind is None:
                self.finish()
                failed = False
        finally:
            self._pool.shutdown(cancel_futures=True)
            # what a full disk does not take of the last batch is made again; another error has said why
            with contextlib.suppress(OSError) if failed else contextlib.nullcontext():
                if self._shard is not None:
                    self._shard.close()

    def add(
        self,
        batch: Batch,
        samples: np.ndarray,
        reasons: dict[int, str],
        images: torch.Tensor,
        tokens: torch.Tensor,
        logits: torch.Tensor | None,
    ) -> None:
        """Takes the answers to a batch.

        Args:
            batch: Which batch of which shard it is.
            samples: (B,) the samples in its order.
            reasons: Sample -> reason of those whose image could not be used, whose entries are left empty.
            images: (B, 3, H, W) the views, normalised.
            tokens: (B, P, C) the teacher's tokens; empty where an entry has none.
            logits: (B, K), or None where it has none.

        Raises:
            UserError: An answer is not finite, or the disk fails.
        """
        fields = encode(self.manifest.layout, tokens, logits) | {"colour": images.mean((2, 3))}
        host, event = self._on_host(fields)
        while len(self._waiting) >= _MOST_WAITING:
            self._result(self._waiting.popleft())
        self._waiting.append(self._pool.submit(self._write, batch, samples, reasons, host, event))

    def _on_host(self, fields: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], Any]:
        """Copies to the host, which a GPU goes on beside; the event says when they are there."""
        if self.device.type != "cuda":
            return fields, None
        host = {name: torch.empty(v.shape, dtype=v.dtype, pin_memory=True) for name, v in fields.items()}
        for name, values in fields.items():
            host[name].copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return host, event

    def finish(self) -> None:
        """Waits until all that was taken is written."""
        while self._waiting:
            self._result(self._waiting.popleft())

    def _result(self, future: Future) -> None:
        try:
            future.result()
        except OSError as error:
            raise UserError(cannot_write(self.folder, error)) from None

    def _write(
        self, batch: Batch, samples: np.ndarray, reasons: dict[int, str], fields: dict[str, torch.Tensor], event: Any
    ) -> None:
        if event is not None:
            event.synchronize()
        present = ~np.isin(samples, list(reasons))
        self._check_finite(samples[present], {name: values[present] for name, values in fields.items()})
        host = {name: to_numpy(values) for name, values in fields.items()}
        shard = self._open(batch)
        shard.append(pack(self.manifest.layout, samples, reasons, host, self.manifest.key(batch.view)))
        if shard.done == shard.count:
            shard.finish()
            self._shard = None

    def _open(self, batch: Batch) -> ShardWriter:
        """The shard of a batch; that of its first batch is opened, at the place where an earlier writer was killed."""
        if self._shard is None:
            count = self.manifest.entries_of(batch.shard)
            path = shard_path(self.folder, batch.view, batch.shard)
            path.parent.mkdir(exist_ok=True)
            self._shard = ShardWriter(
                path, self.manifest.layout.dtype, count, self.manifest.batch, self.manifest.key(batch.view)
            )
        return self._shard

    def _check_finite(self, samples: np.ndarray, fields: dict[str, torch.Tensor]) -> None:
        for name in ("scale", "middle", "tokens", "logits", "top_log_probs"):
            values = fields.get(name)
            if values is None or not values.dtype.is_floating_point:
                continue
            finite = torch.isfinite(values.flatten(1)).all(1)
            if not bool(finite.all()):
                first = samples[int(torch.nonzero(~finite)[0])]
                raise UserError(
                    f"the teacher's answer to image {first} is not finite: its weights overflow in this precision; give "
                    "--run.teacher_precision fp32, or look at the image and the weights."
                )
