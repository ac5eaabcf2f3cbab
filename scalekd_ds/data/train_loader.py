"""Training batches: crop, flip, policy, erasing, with every draw a pure function of (seed, epoch, sample).

DALI decodes the crop alone. On a GPU it resizes and flips there too, and normalises where no policy follows. On a CPU the
rest is the pool's: torch resizes 8-bit images in a fifth of the time that DALI's CPU operator takes (0.17 against 0.85 ms
from a crop of 500x400 to 224), as Pillow does to 2 of 255 levels, and so as timm's and torchvision's loaders do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from nvidia.dali import fn, types

from scalekd_ds.config import DataConfig
from scalekd_ds.data import augment
from scalekd_ds.data.bad_files import BadFiles
from scalekd_ds.data.pipeline import FILTERS, Loader
from scalekd_ds.data.policy import Op, Policy, apply, erasing
from scalekd_ds.data.reader import BadImageError, undecodable
from scalekd_ds.data.sampler import StreamSampler
from scalekd_ds.data.sources.source import Source

_FLIP_STREAM = 1
# images of one task of the pool
_CHUNK = 4


class Drawn(NamedTuple):
    """What is left to do with a sample after DALI: flip, a policy's operations, the box that is erased and its noise."""

    flip: bool
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
        # without a crop there is little to resize: such images are small, or cut out already
        self._host_resize = not self._gpu and (cfg.random_crop or bool(self.policy))
        self._finishes_later = self._host_resize or bool(self.policy)
        # of a row of pixels, channels innermost: what operations uncover is the mean colour
        self._fill = tuple(round(255 * m) for m in mean)
        self._scale = (1.0 / (255.0 * torch.tensor(std))).repeat(cfg.image_size)
        self._shift = (torch.tensor(mean) / torch.tensor(std)).repeat(cfg.image_size)
        self.bad_files = BadFiles(source, sampler.seed, cfg.max_bad_share)
        self._inputs = [(types.UINT8, 1), (types.INT64, 0)]
        if not self._host_resize:
            self._inputs += [(types.INT32, 0)]
        if cfg.random_crop:
            self._inputs += [(types.INT64, 1), (types.INT64, 1)]

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return self._batches(self.start_step * self.sampler.accumulation, None)

    def _graph(self, encoded, labels, *rest):
        size = self.cfg.image_size
        flips, crop = (None, rest) if self._host_resize else (rest[0], rest[1:])
        if crop:
            images = fn.decoders.image_slice(encoded, *crop, axis_names="HW", **self._decoder())
        else:
            images = fn.decoders.image(encoded, **self._decoder())
        if self._host_resize:
            return images, labels
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
        inputs = [encoded, list(self.source.labels[indices])]
        if not self._host_resize:
            inputs += [list(flips.astype(np.int32))]
        drawn = []
        crops = np.empty((len(indices), 4), dtype=np.int64)
        if cfg.random_crop or self.policy or cfg.random_erasing:
            for place, ((index, _, size), epoch) in enumerate(zip(usable, epochs.tolist(), strict=True)):
                rng = augment.generator(sampler.seed, epoch, index)
                if cfg.random_crop:
                    crops[place] = augment.random_resized_crop(rng, *size, cfg.crop_scale, cfg.crop_ratio)
                drawn.append(self._draw(rng, bool(flips[place])))
        if cfg.random_crop:
            inputs += [list(crops[:, :2]), list(crops[:, 2:])]
        return indices, inputs, drawn

    def _draw(self, rng: np.random.Generator, flip: bool) -> Drawn:
        ops = self.policy.draw(rng) if self.policy else []
        box = erasing(rng, self.cfg.image_size, self.cfg.random_erasing) if self.cfg.random_erasing else None
        if box is None:
            return Drawn(flip, ops, None, None)
        noise = rng.standard_normal((3, *box[2:]), dtype=np.float32) if self.cfg.erasing_fill == "noise" else None
        return Drawn(flip, ops, box, noise)

    def _finish(self, pool: ThreadPoolExecutor, images, labels, drawn: list[Drawn]):
        labels = self._tensor(labels)
        if not self._finishes_later:
            images = self._erased(self._tensor(images), drawn)
            return lambda: (images, labels)
        size = self.cfg.image_size
        if self._gpu:
            # pinned, so that the copy back does not wait for the steps before it
            out = torch.empty(len(drawn), size, size, 3, dtype=torch.uint8, pin_memory=True)
            pixels = out.numpy()
            pixels[:] = images.as_cpu().as_array()
            work = self._in_chunks(pool, self._apply_policy, pixels, drawn)
        else:
            pixels, out = [np.asarray(image) for image in images], torch.empty(len(drawn), size, 3 * size)
            work = self._in_chunks(pool, self._resize_and_normalise, pixels, drawn, out)

        def wait() -> tuple[torch.Tensor, torch.Tensor]:
            for future in work:
                future.result()
            normalised = out
            if self._gpu:
                # as bytes over to the device
                rows = out.to(self.device, non_blocking=True).flatten(2).float()
                normalised = rows.mul_(self._scale.to(self.device)).sub_(self._shift.to(self.device))
            # a view of NHWC: channels-last is what the student takes
            return self._erased(normalised.unflatten(2, (size, 3)).permute(0, 3, 1, 2), drawn), labels

        return wait

    @staticmethod
    def _in_chunks(pool: ThreadPoolExecutor, work: Callable[..., None], images, drawn, *more) -> list[Future]:
        def some(first: int) -> None:
            for place in range(first, min(first + _CHUNK, len(drawn))):
                work(place, images[place], drawn[place], *more)

        return [pool.submit(some, first) for first in range(0, len(drawn), _CHUNK)]

    def _apply_policy(self, place: int, pixels: np.ndarray, drawn: Drawn) -> None:
        """The drawn operations on (S, S, 3) uint8, in place."""
        if drawn.ops:
            pixels[:] = apply(pixels, drawn.ops, self._fill)

    def _resize_and_normalise(self, place: int, pixels: np.ndarray, drawn: Drawn, out: torch.Tensor) -> None:
        """All that follows the decoding of (h, w, 3) uint8, into its place in (B, S, 3S): while it is in the cache."""
        size = self.cfg.image_size
        image = torch.from_numpy(pixels)
        if image.shape[:2] != (size, size):
            planes = F.interpolate(
                image.permute(2, 0, 1)[None], (size, size), mode=self.cfg.interpolation, antialias=True
            )
            image = planes[0].permute(1, 2, 0)
        if drawn.flip:
            image = image.flip(1)
        if drawn.ops:
            image = torch.from_numpy(apply(image.numpy(), drawn.ops, self._fill))
        out[place].copy_(image.flatten(1)).mul_(self._scale).sub_(self._shift)

    def _erased(self, images: torch.Tensor, drawn: list[Drawn]) -> torch.Tensor:
        for image, (*_, box, noise) in zip(images, drawn, strict=False):
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
