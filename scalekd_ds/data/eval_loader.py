"""The loader of validation batches, which resizes and crops as torchvision's Resize and CenterCrop do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from nvidia.dali import fn, types

from scalekd_ds.config import DataConfig
from scalekd_ds.data.pipeline import FILTERS, Loader
from scalekd_ds.data.sampler import eval_shard
from scalekd_ds.data.sources.source import Source


def _centre_crop(height: int, width: int, shorter: int, side: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The size after Resize(shorter) and the corner of CenterCrop(side), both (y, x), rounded as torchvision does."""
    if height <= width:
        size = shorter, int(shorter * width / height)
    else:
        size = int(shorter * height / width), shorter
    return size, (round((size[0] - side) / 2.0), round((size[1] - side) / 2.0))


class EvalLoader(Loader):
    """Validation batches of one rank: images are resized, centre cropped and normalised as torchvision does it.

    All ranks together see each image once. Every rank gets the same number of batches; filler completes the last ones.

    Args:
        source: The validation images.
        cfg: Image size, resizing, filter, decoding threads.
        batch_size: Images in a batch.
        rank: This rank.
        world_size: Number of ranks.
        device: Device of the batches.
        mean: (3,) mean of the pixels, which lie in [0, 1].
        std: (3,) standard deviation of the pixels.

    Yields:
        Normalised images (B, 3, S, S) float32 and labels (B,) int64; label -1 marks filler.
    """

    def __init__(
        self,
        source: Source,
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
            interp_type=FILTERS[self.cfg.interpolation],
            antialias=True,
            subpixel_scale=False,
        )
        return self._normalised(fn.slice(images, start=anchors, shape=[side, side], axis_names="HW")), labels

    def _prepare_batch(self, number: int) -> tuple[np.ndarray, list[list[np.ndarray]], None]:
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
