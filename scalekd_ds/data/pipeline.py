"""DALI: one way for CPU and GPU to run a graph that decodes, over batches that the host prepares.

DALI holds no random state. The order comes from the sampler, crops and flips from `augment`, and both go in beside the
encoded bytes: resuming is exact at any step on any number of ranks, with nothing of DALI's to save. Threads read and
draw ahead of DALI, which decodes ahead of the caller.
"""

from __future__ import annotations

import itertools
import sys
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types

from scalekd_ds.config import DataConfig
from scalekd_ds.data.reader import Reader, undecodable
from scalekd_ds.data.sources.source import Source
from scalekd_ds.errors import UserError

# bytes that suffice for every image of ImageNet-1K in NVIDIA's own training examples
_LARGEST_DEVICE_PADDING, _LARGEST_HOST_PADDING = 211_025_920, 140_544_512

FILTERS = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}


class UndecodableError(Exception):
    """DALI failed on one of these samples, and with it the pipeline."""

    def __init__(self, indices: np.ndarray, cause: RuntimeError) -> None:
        super().__init__(str(cause))
        self.indices, self.cause = indices, cause


class Loader:
    """Runs one DALI pipeline over batches that `_samples` prepares on the host.

    Subclasses give `_inputs`, the (type, dimensions) of each input; `_graph(*inputs)`, which makes (images, labels) of
    them; and `_samples(number)`, a batch's sample indices, its inputs, a list over the batch each, and what `_finish` takes.
    """

    _inputs: list[tuple[types.DALIDataType, int]]
    # whether threads of the pool work on a batch after DALI, while the caller is busy with the one before it
    _finishes_later = False

    def __init__(
        self,
        source: Source,
        cfg: DataConfig,
        batch_size: int,
        device: torch.device,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self.source, self.cfg, self.device = source, cfg, device
        self.batch_size, self.mean, self.std = batch_size, mean, std
        self._gpu = device.type == "cuda"
        self._reader = Reader(source, cfg.keep_mb * 2**20)
        self._running: weakref.WeakSet[Generator] = weakref.WeakSet()

    def close(self) -> None:
        """Ends every iteration that is under way, its pipeline and its threads; dropping an iterator does so too."""
        for batches in list(self._running):
            batches.close()

    # -- the graph -----------------------------------------------------------------------------------------------

    def _decoder(self) -> dict:
        common = {"output_type": types.RGB, "adjust_orientation": False}
        if not self._gpu:
            return {"device": "cpu", **common}
        height, width = self.cfg.largest_image
        return {
            "device": "mixed",
            "hw_decoder_load": self.cfg.hw_decoder_load,
            # what nvJPEG needs for the largest image, from the start: growing later stalls every rank of the job
            "device_memory_padding": min(height * width * 6, _LARGEST_DEVICE_PADDING),
            "host_memory_padding": min(height * width * 4, _LARGEST_HOST_PADDING),
            "preallocate_height_hint": height,
            "preallocate_width_hint": width,
            **common,
        }

    def _normalised(self, images, **crop):
        return fn.crop_mirror_normalize(
            images,
            dtype=types.FLOAT,
            output_layout="CHW",
            mean=[255.0 * m for m in self.mean],
            std=[255.0 * s for s in self.std],
            **crop,
        )

    def _graph(self, *inputs):
        raise NotImplementedError

    def _start(self, prepare: Callable[[], list[list[np.ndarray]]]) -> Pipeline:
        pipeline = Pipeline(
            batch_size=self.batch_size,
            num_threads=self.cfg.threads,
            device_id=(self.device.index or 0) if self._gpu else None,
            prefetch_queue_depth=self.cfg.prefetch,
            seed=0,
        )
        with pipeline:
            inputs = fn.external_source(
                source=prepare,
                num_outputs=len(self._inputs),
                dtype=[dtype for dtype, _ in self._inputs],
                ndim=[ndim for _, ndim in self._inputs],
            )
            pipeline.set_outputs(*self._graph(*inputs))
        pipeline.build()
        return pipeline

    # -- running it ----------------------------------------------------------------------------------------------

    def _samples(self, number: int) -> tuple[np.ndarray, list[list[np.ndarray]], Any]:
        raise NotImplementedError

    def _batches(self, first: int, count: int | None) -> Generator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches from number `first` on, `count` of them or without end."""
        batches = self._run(first, None if count is None else first + count)
        self._running.add(batches)
        return batches

    def _run(self, number: int, last: int | None) -> Generator[tuple[torch.Tensor, torch.Tensor]]:
        while last is None or number < last:
            try:
                for batch in self._decode(itertools.count(number) if last is None else iter(range(number, last))):
                    yield batch
                    number += 1
            except UndecodableError as error:
                # the pipeline is of no use after an error: the next one starts at the batch that was not handed out
                self._set_aside(error.indices, error.cause)

    def _decode(self, numbers: Iterator[int]) -> Generator[tuple[torch.Tensor, torch.Tensor]]:
        reading: deque[Future] = deque()
        decoding: deque[tuple[np.ndarray, Any]] = deque()
        finish: Callable[[], tuple[torch.Tensor, torch.Tensor]] | None = None
        # many small tensors: one thread each, and the pool's threads side by side
        pool = ThreadPoolExecutor(self.cfg.threads, "read-images", initializer=torch.set_num_threads, initargs=(1,))

        def read_ahead() -> None:
            for number in itertools.islice(numbers, self.cfg.prefetch + 1 - len(reading)):
                reading.append(pool.submit(self._samples, number))

        def prepare() -> list[list[np.ndarray]]:
            read_ahead()
            if not reading:
                raise StopIteration
            indices, inputs, drawn = reading.popleft().result()
            read_ahead()
            decoding.append((indices, drawn))
            return inputs

        try:
            pipeline = self._start(prepare)
            while True:
                # before the next run, which reuses the memory that is read here
                finished = finish() if finish is not None else None
                try:
                    # on the caller's stream: DALI then reuses an output's memory only after the copy below has run
                    images, labels = pipeline.run(torch.cuda.current_stream(self.device) if self._gpu else None)
                except StopIteration:
                    break
                except RuntimeError as error:
                    raise UndecodableError(np.concatenate([indices for indices, _ in decoding]), error) from None
                finish = self._finish(pool, images, labels, decoding.popleft()[1])
                if not self._finishes_later:
                    finished, finish = finish(), None
                if finished is not None:
                    yield finished
            if finished is not None:
                yield finished
        finally:
            # at the interpreter's end the threads have been joined, and what shutdown needs is gone
            if not sys.is_finalizing():
                pool.shutdown(cancel_futures=True)

    def _finish(
        self, pool: ThreadPoolExecutor, images, labels, drawn
    ) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        """Starts what is left to do with DALI's outputs, and returns what waits for it."""
        batch = self._tensor(images), self._tensor(labels)
        return lambda: batch

    def _tensor(self, outputs) -> torch.Tensor:
        # the outputs are DALI's own memory, reused by a later run: copy them out
        return torch.from_dlpack(outputs.as_tensor()).to(self.device, copy=True)

    def _set_aside(self, indices: np.ndarray, error: RuntimeError) -> None:
        """Says which of the samples that were being decoded cannot be; without one, the error is another."""
        bad = undecodable(self.source, np.unique(indices).tolist())
        if not bad:
            raise error
        raise UserError(f"image {self.source.name(next(iter(bad)))!r} cannot be decoded. Mend or remove it.")
