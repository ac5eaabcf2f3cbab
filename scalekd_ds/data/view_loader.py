"""The loader of a job that goes through views of samples itself, and asks which images it has got."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from scalekd_ds.config import DataConfig
from scalekd_ds.data.pipeline import Prepared
from scalekd_ds.data.sampler import Sampler
from scalekd_ds.data.sources.source import Source
from scalekd_ds.data.train_loader import TrainLoader


class ViewLoader(TrainLoader):
    """A finite number of batches of views, as `TrainLoader` makes them, with the indices of their images.

    Args:
        source: The training images.
        cfg: Image size, augmentations, decoding threads.
        sampler: Batch n is `sampler.indices(n, 0)`, of `sampler.micro_batch` samples or fewer; its accumulation is 1.
        device: Device of the images; a GPU also decodes.
        mean: (3,) mean of the pixels, which lie in [0, 1].
        std: (3,) standard deviation of the pixels.
        start: Number of the first batch.
        count: Number of batches.

    Raises:
        ValueError: The sampler accumulates.
        UserError: As for `TrainLoader`.

    Yields:
        Normalised images (B, 3, S, S) float32, and as arrays on the host (B,) int64 the samples that the order asked for, and
        (B,) int64 those that are shown: where the two differ, the first is a bad file.
    """

    def __init__(
        self,
        source: Source,
        cfg: DataConfig,
        sampler: Sampler,
        device: torch.device,
        mean: Sequence[float],
        std: Sequence[float],
        start: int,
        count: int,
    ) -> None:
        if sampler.accumulation != 1:
            raise ValueError(f"batches are numbered without steps, and the sampler has {sampler.accumulation} in each.")
        super().__init__(source, cfg, sampler, device, mean, std)
        self.start, self.count = start, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return self._batches(self.start, self.count)

    def _handed_over(self, images: torch.Tensor, prepared: Prepared) -> tuple[Any, ...]:
        ordered = prepared.drawn.ordered
        return images, ordered, prepared.indices[: len(ordered)]
