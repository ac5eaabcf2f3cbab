"""The base class of both loaders: a DALI pipeline, on CPU or GPU, over batches that threads prepare on the host.

DALI holds no random state. The sampler gives the order and `augment` the crops and flips, and DALI gets them as inputs
beside the encoded bytes. A run therefore resumes exactly at any step on any number of ranks, with no state of DALI in
the checkpoint. The threads read and draw ahead of DALI, which decodes ahead of the caller.

Labels and all else that is known on the host pass DALI by. On a GPU they go there from pinned memory, by copies that wait
neither for the steps before nor for each other.
"""

from __future__ import annotations

import itertools
import sys
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types

from scalekd_ds.config import DataConfig
from scalekd_ds.data.reader import Reader, find_undecodable
from scalekd_ds.data.sources.source import Source
from scalekd_ds.data.threads import decoder_threads, pool_threads

# bytes that are enough for every image of ImageNet-1K, from NVIDIA's training examples
_LARGEST_DEVICE_PADDING, _LARGEST_HOST_PADDING = 211_025_920, 140_544_512

FILTERS = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}


class UndecodableError(Exception):
    """DALI failed on one of the samples `indices`; its pipeline cannot be used any more."""

    def __init__(self, indices: np.ndarray, cause: RuntimeError) -> None:
        super().__init__(str(cause))
        self.indices, self.cause = indices, cause


class Prepared(NamedTuple):
    """A batch that a thread of the pool has read and drawn.

    Attributes:
        indices: (N,) the images: the samples, and behind them those that some of them are mixed with.
        inputs: Each input of the pipeline, as a list of N arrays.
        labels: (B,) int64 of the samples, or (B, K) float32, on the host; pinned where the batches go to a GPU.
        drawn: What `_postprocess` of the subclass needs.
    """

    indices: np.ndarray
    inputs: list[list[np.ndarray]]
    labels: torch.Tensor
    drawn: Any = None


class Loader:
    """Runs a DALI pipeline over batches that are prepared on the host.

    A subclass gives `_inputs`, the (type, number of dimensions) of each input of the pipeline, and the methods `_graph`,
    `_prepare_batch` and `_handle_undecodable`. It may also override `_postprocess`.

    Args:
        source: The images.
        cfg: Sizes, augmentations, threads.
        batch_size: Most images in a batch.
        device: Device of the batches; a GPU also decodes.
        mean: (3,) mean of the pixels, which lie in [0, 1].
        std: (3,) standard deviation of the pixels.
    """

    _inputs: list[tuple[types.DALIDataType, int]]
    # whether the thread pool works on a batch after DALI, on the host and while the caller has the batch before it
    _postprocess_in_pool = False
    # whether a GPU's decoder interpolates the colours of a JPEG, as libjpeg-turbo and so Pillow and the decoder of a CPU do
    _interpolate_colours = False
    # whether a GPU's decoder has memory for the largest image from the start: a later growth stalls every rank of the job
    _reserve_for_the_largest = True

    def __init__(
        self,
        source: Source,
        cfg: DataConfig,
        batch_size: int,
        device: torch.device,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self._gpu = device.type == "cuda"
        # DALI asks for a number, and the process's own GPU need not be the first
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if self._gpu and device.index is None else device
        )
        self.source, self.cfg = source, cfg
        self.batch_size, self.mean, self.std = batch_size, mean, std
        self._reader = Reader(source, cfg.keep_mb * 2**20)
        self._read_again = False
        self._iterations: weakref.WeakSet[Generator] = weakref.WeakSet()

    def close(self) -> None:
        """Ends every unfinished iteration with its pipeline and threads; deleting an iterator ends it as well."""
        for batches in list(self._iterations):
            batches.close()

    def _decoder(self) -> dict:
        """Arguments of DALI's image decoder on this device."""
        common = {"output_type": types.RGB, "adjust_orientation": False}
        if not self._gpu:
            return {"device": "cpu", **common}
        on_gpu = {
            "device": "mixed",
            "hw_decoder_load": self.cfg.hw_decoder_load,
            "jpeg_fancy_upsampling": self._interpolate_colours,
            **common,
        }
        if not self._reserve_for_the_largest:
            return on_gpu
        height, width = self.cfg.largest_image
        return {
            "device_memory_padding": min(height * width * 6, _LARGEST_DEVICE_PADDING),
            "host_memory_padding": min(height * width * 4, _LARGEST_HOST_PADDING),
            "preallocate_height_hint": height,
            "preallocate_width_hint": width,
            **on_gpu,
        }

    def _normalised(self, images: Any, **crop: Any) -> Any:
        """DALI's node that makes (H, W, 3) uint8 into normalised (3, H, W) float32."""
        return fn.crop_mirror_normalize(
            images,
            dtype=types.FLOAT,
            output_layout="CHW",
            mean=[255.0 * m for m in self.mean],
            std=[255.0 * s for s in self.std],
            **crop,
        )

    def _graph(self, *inputs: Any) -> Any:
        """The node of the pipeline's images, from its inputs in the order of `_inputs`."""
        raise NotImplementedError

    def _build_pipeline(self, prepare: Callable[[], list[list[np.ndarray]]]) -> Pipeline:
        """A pipeline that calls `prepare` for the inputs of each batch."""
        pipeline = Pipeline(
            batch_size=self.batch_size,
            num_threads=decoder_threads(self.cfg, self._gpu),
            device_id=self.device.index if self._gpu else None,
            prefetch_queue_depth=self.cfg.prefetch,
            # outputs on the caller's stream, and copies from the GPU to the host within the graph, are this executor's
            exec_dynamic=True,
            seed=0,
        )
        with pipeline:
            inputs = fn.external_source(
                source=prepare,
                num_outputs=len(self._inputs),
                dtype=[dtype for dtype, _ in self._inputs],
                ndim=[ndim for _, ndim in self._inputs],
            )
            pipeline.set_outputs(self._graph(*inputs))
        pipeline.build()
        return pipeline

    def _prepare_batch(self, number: int) -> Prepared:
        """Reads batch `number` and draws its augmentations, in a thread of the pool."""
        raise NotImplementedError

    def _pinned(self, values: torch.Tensor) -> torch.Tensor:
        """Values on the host in memory from which a GPU copies them by itself; on a CPU they stay where they are."""
        return values.pin_memory() if self._gpu else values

    def _sent(self, values: torch.Tensor) -> torch.Tensor:
        """Values of `_pinned` on the device, in the order of the caller's stream and without waiting for it.

        The pinned memory may be let go of at once: PyTorch's allocator records an event of the stream that copies, and
        hands the memory out again only after it.
        """
        return values.to(self.device, non_blocking=True)

    def _batches(self, first: int, count: int | None) -> Generator[tuple[Any, ...]]:
        """`count` batches from number `first` on; None is without end."""
        batches = self._run_with_restarts(first, None if count is None else first + count)
        self._iterations.add(batches)
        return batches

    def _run_with_restarts(self, number: int, last: int | None) -> Generator[tuple[Any, ...]]:
        """Batches `number` to `last` - 1, with a new pipeline after each undecodable image."""
        try:
            while last is None or number < last:
                numbers = itertools.count(number) if last is None else iter(range(number, last))
                try:
                    for batch in self._run_pipeline(numbers):
                        yield batch
                        number += 1
                        self._read_again = False
                except UndecodableError as error:
                    # a pipeline cannot run after an error: the next one starts at the first batch that was not yielded
                    self._handle_undecodable(error.indices, error.cause)
        finally:
            self._after_pipeline()

    def _after_pipeline(self) -> None:
        """Follows the end of an iteration, whose pipeline is gone."""

    def _run_pipeline(self, numbers: Iterator[int]) -> Generator[tuple[Any, ...]]:
        """The batches `numbers`, by one pipeline.

        Raises:
            UndecodableError: DALI failed on a sample.
        """
        reading: deque[Future] = deque()
        decoding: deque[Prepared] = deque()
        finish: Callable[[], tuple[Any, ...]] | None = None
        # the pool runs in parallel over images, so torch gets one thread in each of its threads
        pool = ThreadPoolExecutor(
            pool_threads(self.cfg), "read-images", initializer=torch.set_num_threads, initargs=(1,)
        )

        def read_ahead() -> None:
            for number in itertools.islice(numbers, self.cfg.prefetch + 1 - len(reading)):
                reading.append(pool.submit(self._prepare_batch, number))

        def prepare() -> list[list[np.ndarray]]:
            read_ahead()
            if not reading:
                raise StopIteration
            prepared = reading.popleft().result()
            read_ahead()
            decoding.append(prepared)
            return prepared.inputs

        try:
            pipeline = self._build_pipeline(prepare)
            while True:
                # before the next run of the pipeline, which reuses the memory that postprocessing reads
                finished = finish() if finish is not None else None
                try:
                    # on the caller's stream, so that DALI reuses the memory of an output only after the copy in
                    # `_tensor`; images on the host are waited for instead, and for no step of the caller's
                    on_gpu = self._gpu and not self._postprocess_in_pool
                    (images,) = pipeline.run(torch.cuda.current_stream(self.device) if on_gpu else None)
                except StopIteration:
                    break
                except RuntimeError as error:
                    raise UndecodableError(np.concatenate([each.indices for each in decoding]), error) from None
                finish = self._postprocess(pool, images, decoding.popleft())
                if not self._postprocess_in_pool:
                    finished, finish = finish(), None
                if finished is not None:
                    yield finished
            if finished is not None:
                yield finished
        finally:
            # when the interpreter exits the threads are already joined, and shutdown would fail
            if not sys.is_finalizing():
                pool.shutdown(cancel_futures=True)

    def _postprocess(self, pool: ThreadPoolExecutor, images: Any, prepared: Prepared) -> Callable[[], tuple[Any, ...]]:
        """Starts the work on a batch that follows DALI.

        Args:
            pool: Threads for the work.
            images: DALI's output.
            prepared: The batch as it went into DALI.

        Returns:
            A function that waits for the work and returns the batch (images, labels).
        """
        batch = self._tensor(images), self._sent(prepared.labels)
        return lambda: batch

    def _tensor(self, outputs: Any) -> torch.Tensor:
        # the outputs are in memory that DALI reuses in a later run: they are copied
        return torch.from_dlpack(outputs.as_tensor()).to(self.device, copy=True)

    def _handle_undecodable(self, indices: np.ndarray, error: RuntimeError) -> None:
        """Acts on an error of DALI at the samples `indices`, so that the same batch can be made; or raises `error`."""
        raise NotImplementedError

    def _find_undecodable(self, indices: Sequence[int], error: RuntimeError) -> dict[int, str]:
        """Index -> reason of the undecodable images among `indices`; what DALI alone refuses is read by Pillow from here on.

        Where both decode all of them, a file was being written while it was read, and they are read again. `error` is
        raised where that leads to no batch either.
        """
        bad = find_undecodable(self.source, indices)
        good = [index for index in indices if index not in bad]
        if not self._reader.take_refused(good, self._decoder(), self.device.index if self._gpu else None) and not bad:
            if self._read_again:
                raise error
            self._read_again = True
            self._reader.forget(indices)
        return bad
