"""Training batches: crop, flip, policy, erasing, with every draw a pure function of (seed, epoch, sample)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from nvidia.dali import fn, types

from scalekd_ds.config import DataConfig
from scalekd_ds.data import augment
from scalekd_ds.data.bad_files import BadFiles
from scalekd_ds.data.pipeline import FILTERS, Loader
from scalekd_ds.data.policy import Op, Policy, apply, erasing
from scalekd_ds.data.reader import BadImageError, undecodable
from scalekd_ds.data.sampler import StreamSampler
from scalekd_ds.data.source import Source

_FLIP_STREAM = 1
# images of one task of the pool
_CHUNK = 4


class Drawn(NamedTuple):
    """What is left to do with a sample after DALI: a policy's operations, and the box that is erased, with its noise."""

    ops: list[Op]
    box: tuple[int, int, int, int] | None
    noise: np.ndarray | None


class TrainLoader(Loader):
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
        source: Source,
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
        # of a row of pixels, channels innermost: what operations uncover is the mean colour
        self._fill = tuple(round(255 * m) for m in mean)
        self._scale = (1.0 / (255.0 * torch.tensor(std))).repeat(cfg.image_size)
        self._shift = (torch.tensor(mean) / torch.tensor(std)).repeat(cfg.image_size)
        self.bad_files = BadFiles(source, sampler.seed, cfg.max_bad_share)
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
            interp_type=FILTERS[self.cfg.interpolation],
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
        size = self.cfg.image_size
        out = None if self._gpu else torch.empty(len(pixels), size, 3 * size)
        work = [pool.submit(self._apply_to, pixels, out, drawn, i) for i in range(0, len(drawn), _CHUNK)]

        def wait() -> tuple[torch.Tensor, torch.Tensor]:
            for future in work:
                future.result()
            normalised = out
            if normalised is None:
                # as bytes over to the device
                rows = torch.from_numpy(pixels).to(self.device, non_blocking=True).flatten(2).float()
                normalised = rows.mul_(self._scale.to(self.device)).sub_(self._shift.to(self.device))
            # a view of NHWC: channels-last is what the student takes
            return self._erased(normalised.unflatten(2, (size, 3)).permute(0, 3, 1, 2), drawn), labels

        return wait

    def _apply_to(self, pixels: np.ndarray, out: torch.Tensor | None, drawn: list[Drawn], first: int) -> None:
        """Applies the drawn operations to some images (B, H, W, 3) in place; on a CPU normalises them, (B, H, 3W), too."""
        for place in range(first, min(first + _CHUNK, len(drawn))):
            image = pixels[place]
            if drawn[place].ops:
                image = apply(image, drawn[place].ops, self._fill)
            if out is not None:
                # while the image is in the cache: a sixth of the time that the whole batch takes
                out[place].copy_(torch.from_numpy(image).flatten(1)).mul_(self._scale).sub_(self._shift)
            elif drawn[place].ops:
                pixels[place] = image

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
        bad = undecodable(self.source, np.unique(indices).tolist())
        if not bad:
            raise error
        for index, reason in bad.items():
            self.bad_files.add(index, reason)
