"""The loader of validation batches, which resizes and crops as torchvision's Resize and CenterCrop do."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from nvidia.dali import backend, fn, types
from PIL import Image

from scalekd_ds.config import DataConfig
from scalekd_ds.data.centre_crop import View, centre_view
from scalekd_ds.data.pipeline import FILTERS, Loader, Prepared
from scalekd_ds.data.reader import BadImageError, StorageGoneError
from scalekd_ds.data.sampler import eval_shard
from scalekd_ds.data.sources.source import Source

# labels that are no class: of filler, which completes a batch, and of an image that cannot be used
FILLER, LEFT_OUT = -1, -2


def _black_square(side: int) -> np.ndarray:
    """An encoded image that stands where there is none to show."""
    data = io.BytesIO()
    Image.new("RGB", (side, side)).save(data, "JPEG")
    return np.frombuffer(data.getvalue(), dtype=np.uint8)


class EvalLoader(Loader):
    """Validation batches of one rank: images are resized, centre cropped and normalised as torchvision does it.

    All ranks together see each image once. Every rank gets the same number of batches; filler completes the last ones. An
    image that cannot be read or decoded is left out, and a black one with the label -2 keeps its place: no other image may
    take it, which would count twice.

    Args:
        source: The validation images.
        cfg: Image size, resizing, filter, decoding threads.
        batch_size: Images in a batch.
        rank: This rank.
        world_size: Number of ranks.
        device: Device of the batches.
        mean: (3,) mean of the pixels, which lie in [0, 1].
        std: (3,) standard deviation of the pixels.

    Attributes:
        left_out: Index -> reason of the images of this rank that cannot be used, as far as they are known; a reason
            completes the sentence "FILE ...".
        storage_gone: Why none of the images can be read any more, or None.

    Yields:
        Normalised images (B, 3, S, S) float32 and labels (B,) int64; label -1 marks filler, and -2 an image that cannot be
        used.
    """

    # accuracies are compared with those of other libraries; it costs time, which training has other uses for
    _interpolate_colours = True
    # the pipeline of the training is there beside this one: it takes what the images need, and only while it runs
    _reserve_for_the_largest = False

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
        self._inputs = [(types.UINT8, 1), *[(types.FLOAT, 1)] * 3, (types.INT32, 1)]
        self.shard = eval_shard(len(source), rank, world_size, batch_size)
        self.left_out: dict[int, str] = {}
        self.storage_gone: str | None = None
        self._black = _black_square(cfg.image_size)

    def __len__(self) -> int:
        return len(self.shard)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return self._batches(0, len(self.shard))

    def _after_pipeline(self) -> None:
        if self._gpu:
            # else DALI keeps it for pipelines to come, and PyTorch could not have it until the next evaluation
            backend.ReleaseUnusedMemory()

    def _graph(self, encoded: Any, starts: Any, ends: Any, sizes: Any, anchors: Any) -> Any:
        side = self.cfg.image_size
        images = fn.resize(
            fn.decoders.image(encoded, **self._decoder()),
            roi_start=starts,
            roi_end=ends,
            size=sizes,
            interp_type=FILTERS[self.cfg.interpolation],
            antialias=True,
            subpixel_scale=False,
        )
        return self._normalised(fn.slice(images, start=anchors, shape=[side, side], axis_names="HW"))

    def _prepare_batch(self, number: int) -> Prepared:
        side, labels, encoded, views = self.cfg.image_size, [], [], []
        for index in self.shard[number].tolist():
            image = self._read(index)
            if image is None:
                labels.append(FILLER if index < 0 else LEFT_OUT)
                image = self._black, centre_view(side, side, side, side)
            else:
                labels.append(int(self.source.labels[index]))
            encoded.append(image[0])
            views.append(image[1])
        starts, ends, sizes, anchors = (list(map(np.array, each)) for each in zip(*views, strict=True))
        floats = [[each.astype(np.float32) for each in listed] for listed in (starts, ends, sizes)]
        inputs = [encoded, *floats, [each.astype(np.int32) for each in anchors]]
        return Prepared(self.shard[number], inputs, self._pinned(torch.tensor(labels)))

    def _read(self, index: int) -> tuple[np.ndarray, View] | None:
        """The encoded bytes of an image, and what is seen of it; None for filler and without an image.

        An error of one rank must not end its evaluation, since the others wait for it in the next collective.
        """
        if index < 0 or index in self.left_out:
            return None
        try:
            data = self._reader.encoded(index)
            return data, centre_view(*self._reader.size(index, data), self.cfg.eval_shorter_side, self.cfg.image_size)
        except BadImageError as error:
            self.left_out[index] = error.reason
        except StorageGoneError as error:
            self.storage_gone = str(error)
            self.left_out[index] = "cannot be read"
        return None

    def _handle_undecodable(self, indices: np.ndarray, error: RuntimeError) -> None:
        """Records the undecodable images of `indices`, which are then left out; raises `error` where there is none."""
        shown = [index for index in np.unique(indices).tolist() if index >= 0 and index not in self.left_out]
        self.left_out |= self._find_undecodable(shown, error)
