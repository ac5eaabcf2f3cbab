"""DALI: one definition for CPU and GPU that decodes, crops, resizes and normalises.

DALI holds no random state. The order comes from the sampler, crops and flips from `augment`, and both go in beside the
encoded bytes: resuming is exact at any step on any number of ranks, with nothing of DALI's to save. Threads read and
draw ahead of DALI, which decodes ahead of the caller.
"""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types

from scalekd_ds.config import DataConfig
from scalekd_ds.data import augment
from scalekd_ds.data.bad_files import BadFiles
from scalekd_ds.data.policy import Op, Policy, apply, erasing
from scalekd_ds.data.reader import BadImageError, Reader, undecodable
from scalekd_ds.data.sampler import StreamSampler, eval_shard
from scalekd_ds.data.source import ImageFolder
from scalekd_ds.errors import UserError

_FILTERS = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}
_FLIP_STREAM = 1
# images of one task of the pool
_CHUNK = 4


class Drawn(NamedTuple):
    """What is left to do with a sample after DALI: a policy's operations, and the box that is erased, with its noise."""

    ops: list[Op]
    box: tuple[int, int, int, int] | None
    noise: np.ndarray | None


def _apply_to(pixels: np.ndarray, drawn: list[Drawn], first: int, fill: tuple[int, int, int]) -> None:
    """Applies the drawn operations to some images of (B, H, W, 3) uint8, in place."""
    for place in range(first, min(first + _CHUNK, len(drawn))):
        if drawn[place].ops:
            pixels[place] = apply(pixels[place], drawn[place].ops, fill)


def _centre_crop(height: int, width: int, shorter: int, side: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Size after Resize(shorter) and anchor of CenterCrop(side), both (y, x), rounded as torchvision rounds them."""
    if height <= width:
        size = shorter, int(shorter * width / height)
    else:
        size = int(shorter * height / width), shorter
    return size, (round((size[0] - side) / 2.0), round((size[1] - side) / 2.0))


class _UndecodableError(Exception):
    """DALI failed on one of these samples, and with it the pipeline."""

    def __init__(self, indices: np.ndarray, cause: RuntimeError) -> None:
        super().__init__(str(cause))
        self.indices, self.cause = indices, cause


class _Loader:
    """Runs one DALI pipeline over batches that `_samples` prepares on the host.

    Subclasses give `_inputs`, the (type, dimensions) of each input; `_graph(*inputs)`, which makes (images, labels) of
    them; and `_samples(number)`, a batch's sample indices, its inputs, a list over the batch each, and what `_finish` takes.
    """

    _inputs: list[tuple[types.DALIDataType, int]]
    # batches whose finish overlaps with the decoding of the next
    _finish_ahead = 0

    def __init__(
        self,
        source: ImageFolder,
        cfg: DataConfig,
        batch_size: int,
        device: torch.device,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self.source, self.cfg, self.device = source, cfg, device
        self.batch_size, self.mean, self.std = batch_size, mean, std
        self._gpu = device.type == "cuda"
        self._reader = Reader(source.paths)
        self._running: weakref.WeakSet[Generator] = weakref.WeakSet()

    def close(self) -> None:
        """Ends every iteration that is under way, its pipeline and its threads; dropping an iterator does so too."""
        for batches in list(self._running):
            batches.close()

    # -- the graph -----------------------------------------------------------------------------------------------

    def _decoder(self) -> dict:
        return {"device": "mixed" if self._gpu else "cpu", "output_type": types.RGB, "adjust_orientation": False}

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
            except _UndecodableError as error:
                # the pipeline is of no use after an error: the next one starts at the batch that was not handed out
                self._set_aside(error.indices, error.cause)

    def _decode(self, numbers: Iterator[int]) -> Generator[tuple[torch.Tensor, torch.Tensor]]:
        reading: deque[Future] = deque()
        decoding: deque[tuple[np.ndarray, Any]] = deque()
        finishing: deque[Callable[[], tuple[torch.Tensor, torch.Tensor]]] = deque()
        pool = ThreadPoolExecutor(self.cfg.threads, thread_name_prefix="read-images")

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
                try:
                    # on the caller's stream: DALI then reuses an output's memory only after the copy below has run
                    images, labels = pipeline.run(torch.cuda.current_stream(self.device) if self._gpu else None)
                except StopIteration:
                    break
                except RuntimeError as error:
                    raise _UndecodableError(np.concatenate([indices for indices, _ in decoding]), error) from None
                finishing.append(self._finish(pool, images, labels, decoding.popleft()[1]))
                if len(finishing) > self._finish_ahead:
                    yield finishing.popleft()()
            while finishing:
                yield finishing.popleft()()
        finally:
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
        bad = undecodable([self.source.paths[i] for i in indices])
        if not bad:
            raise error
        raise UserError(f"image {next(iter(bad))!r} cannot be decoded. Mend or remove it.")


class TrainLoader(_Loader):
    """Endless training batches of one rank, from any optimizer step on.

    A file that cannot be read or decoded is replaced by another of its class, the same one in every run.

    Args:
        source: The training images.
        cfg: Size, crop, flip, threads.
        sampler: This rank's order; its micro batch is the batch size.
        device: Where the batches go; decoding is on it too where it is a GPU.
        mean: Of the pixels in units of 0 to 1.
        std: Likewise.
        start_step: Optimizer step to start at.

    Attributes:
        bad_files: What was replaced on this rank.

    Raises:
        UserError: While iterating, when more than `cfg.max_bad_share` of the files are bad.

    Yields:
        images (B, 3, S, S) float32, normalised, and labels (B,) int64.
    """

    def __init__(
        self,
        source: ImageFolder,
        cfg: DataConfig,
        sampler: StreamSampler,
        device: torch.device,
        mean: Sequence[float],
        std: Sequence[float],
        start_step: int = 0,
    ) -> None:
        super().__init__(source, cfg, sampler.micro_batch, device, mean, std)
        self.sampler, self.start_step = sampler, start_step
        self.policy = Policy(cfg.auto_augment, cfg.color_jitter, cfg.interpolation)
        self._finish_ahead = 1 if self.policy else 0
        self.bad_files = BadFiles(source.paths, source.labels, sampler.seed, cfg.max_bad_share)
        self._inputs = [(types.UINT8, 1), (types.INT64, 0), (types.INT32, 0)]
        if cfg.random_crop:
            self._inputs += [(types.INT64, 1), (types.INT64, 1)]

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return self._batches(self.start_step * self.sampler.accumulation, None)

    def _graph(self, encoded, labels, flips, *crop):
        size = self.cfg.image_size
        if crop:
            images = fn.decoders.image_slice(encoded, *crop, axis_names="HW", **self._decoder())
        else:
            images = fn.decoders.image(encoded, **self._decoder())
        images = fn.resize(
            images,
            resize_x=size,
            resize_y=size,
            interp_type=_FILTERS[self.cfg.interpolation],
            antialias=True,
            subpixel_scale=False,
        )
        if self.policy:
            return fn.flip(images, horizontal=flips), labels
        return self._normalised(images, mirror=flips), labels

    def _samples(self, number: int) -> tuple[np.ndarray, list[list[np.ndarray]], list[Drawn]]:
        sampler, cfg = self.sampler, self.cfg
        drawn, epochs = sampler.indices(*divmod(number, sampler.accumulation))
        usable = [self._usable(i, epoch) for i, epoch in zip(drawn.tolist(), epochs.tolist(), strict=True)]
        indices = np.array([index for index, _, _ in usable])
        encoded = [data for _, data, _ in usable]
        flips = augment.uniform(sampler.seed, epochs, indices, _FLIP_STREAM) < cfg.hflip
        inputs = [encoded, list(self.source.labels[indices]), list(flips.astype(np.int32))]
        drawn = []
        crops = np.empty((len(indices), 4), dtype=np.int64)
        if cfg.random_crop or self.policy or cfg.random_erasing:
            for place, ((index, _, size), epoch) in enumerate(zip(usable, epochs.tolist(), strict=True)):
                rng = augment.generator(sampler.seed, epoch, index)
                if cfg.random_crop:
                    crops[place] = augment.random_resized_crop(rng, *size, cfg.crop_scale, cfg.crop_ratio)
                drawn.append(self._draw(rng))
        if cfg.random_crop:
            inputs += [list(crops[:, :2]), list(crops[:, 2:])]
        return indices, inputs, drawn

    def _draw(self, rng: np.random.Generator) -> Drawn:
        ops = self.policy.draw(rng) if self.policy else []
        box = erasing(rng, self.cfg.image_size, self.cfg.random_erasing) if self.cfg.random_erasing else None
        if box is None:
            return Drawn(ops, None, None)
        noise = rng.standard_normal((3, *box[2:]), dtype=np.float32) if self.cfg.erasing_fill == "noise" else None
        return Drawn(ops, box, noise)

    def _finish(self, pool: ThreadPoolExecutor, images, labels, drawn: list[Drawn]):
        labels = self._tensor(labels)
        if not self.policy:
            images = self._erased(self._tensor(images), drawn)
            return lambda: (images, labels)
        pixels = np.array(images.as_cpu().as_array() if self._gpu else images.as_array())
        fill = tuple(round(255 * m) for m in self.mean)
        work = [pool.submit(_apply_to, pixels, drawn, i, fill) for i in range(0, len(drawn), _CHUNK)]

        def wait() -> tuple[torch.Tensor, torch.Tensor]:
            for future in work:
                future.result()
            # as bytes over to the device, and a view of NHWC: channels-last is what the student takes
            batch = torch.from_numpy(pixels).to(self.device, non_blocking=True).permute(0, 3, 1, 2).float()
            mean, std = (torch.tensor(v, device=self.device)[:, None, None] * 255.0 for v in (self.mean, self.std))
            return self._erased(batch.sub_(mean).div_(std), drawn), labels

        return wait

    def _erased(self, images: torch.Tensor, drawn: list[Drawn]) -> torch.Tensor:
        for image, (_, box, noise) in zip(images, drawn, strict=False):
            if box is not None:
                y, x, h, w = box
                image[:, y : y + h, x : x + w] = 0.0 if noise is None else torch.from_numpy(noise).to(images.device)
        return images

    def _usable(self, index: int, epoch: int) -> tuple[int, np.ndarray, tuple[int, int] | None]:
        """The sample or what replaces it, its bytes, and (height, width) where a crop needs them."""
        drawn = index
        while True:
            while index in self.bad_files:
                index = self.bad_files.replacement(drawn, epoch)
            try:
                data = self._reader.encoded(index)
                return index, data, self._reader.size(index, data) if self.cfg.random_crop else None
            except BadImageError as error:
                self.bad_files.add(index, error.reason)

    def _set_aside(self, indices: np.ndarray, error: RuntimeError) -> None:
        unique = np.unique(indices)
        bad = undecodable([self.source.paths[i] for i in unique])
        if not bad:
            raise error
        for index in unique.tolist():
            if self.source.paths[index] in bad:
                self.bad_files.add(index, bad[self.source.paths[index]])


class EvalLoader(_Loader):
    """Validation batches of one rank: resize, centre crop, normalise, as torchvision does.

    Args:
        source: The validation images.
        cfg: Size, resize, filter, threads.
        batch_size: Images of a batch.
        rank: This rank.
        world_size: All ranks; together they see each image once, in the same number of batches.
        device: Where the batches go.
        mean: Of the pixels in units of 0 to 1.
        std: Likewise.

    Yields:
        images (B, 3, S, S) float32, normalised, and labels (B,) int64, -1 for filler.
    """

    def __init__(
        self,
        source: ImageFolder,
        cfg: DataConfig,
        batch_size: int,
        rank: int,
        world_size: int,
        device: torch.device,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__(source, cfg, batch_size, device, mean, std)
        self._inputs = [(types.UINT8, 1), (types.INT64, 0), (types.FLOAT, 1), (types.INT32, 1)]
        self.shard = eval_shard(len(source), rank, world_size, batch_size)

    def __len__(self) -> int:
        return len(self.shard)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return self._batches(0, len(self.shard))

    def _graph(self, encoded, labels, sizes, anchors):
        side = self.cfg.image_size
        images = fn.resize(
            fn.decoders.image(encoded, **self._decoder()),
            size=sizes,
            interp_type=_FILTERS[self.cfg.interpolation],
            antialias=True,
            subpixel_scale=False,
        )
        return self._normalised(fn.slice(images, start=anchors, shape=[side, side], axis_names="HW")), labels

    def _samples(self, number: int) -> tuple[np.ndarray, list[list[np.ndarray]], None]:
        indices = self.shard[number]
        read = np.maximum(indices, 0)
        labels = np.where(indices < 0, -1, self.source.labels[read])
        encoded = [self._reader.encoded(i) for i in read.tolist()]
        boxes = [
            _centre_crop(*self._reader.size(i, data), self.cfg.eval_shorter_side, self.cfg.image_size)
            for data, i in zip(encoded, read.tolist(), strict=True)
        ]
        sizes = [np.array(size, dtype=np.float32) for size, _ in boxes]
        anchors = [np.array(anchor, dtype=np.int32) for _, anchor in boxes]
        return read, [encoded, list(labels), sizes, anchors], None
