"""Random erasing of a batch: the boxes of all its images, packed so that a GPU gets them in two copies.

A copy and a kernel an image would cost more host time than the images themselves. The numbers are the same on every
device, since the noise is drawn on the host from the sample's own generator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch


class ErasedBox(NamedTuple):
    """What is erased of one image.

    Attributes:
        box: (y, x, h, w) in pixels.
        noise: (3, h, w) float32 that fills the box; None fills it with 0, the mean colour.
    """

    box: tuple[int, int, int, int]
    noise: np.ndarray | None


class Boxes(NamedTuple):
    """What is erased of a batch, E of whose images have a box.

    Attributes:
        table: (E, 5) int64: the image's place in the batch in rising order, then y, x, h and w in pixels.
        noise: (N,) float32, the noise of all boxes one after the other; None fills them with 0, the mean colour.
    """

    table: torch.Tensor
    noise: torch.Tensor | None


def pack_boxes(
    erased: Sequence[ErasedBox | None], pinned: Callable[[torch.Tensor], torch.Tensor] = lambda values: values
) -> Boxes | None:
    """The boxes of a batch; None where nothing is erased.

    Args:
        erased: What is erased of each image, or None.
        pinned: Moves values to where a GPU copies them from.
    """
    found = [(place, each) for place, each in enumerate(erased) if each is not None]
    if not found:
        return None
    table = pinned(torch.tensor([(place, *each.box) for place, each in found]))
    noises = [each.noise.ravel() for _, each in found if each.noise is not None]
    return Boxes(table, pinned(torch.from_numpy(np.concatenate(noises))) if noises else None)


def erase(images: torch.Tensor, boxes: Boxes) -> None:
    """Fills the boxes of normalised images (B, 3, S, S), in place; `boxes` is on their device."""
    (_erase_by_mask if images.device.type == "cuda" else _erase_one_by_one)(images, boxes)


def _erase_one_by_one(images: torch.Tensor, boxes: Boxes) -> None:
    """The way of a CPU, which touches no pixel outside of the boxes."""
    used = 0
    for place, y, x, h, w in boxes.table.tolist():
        box = images[place, :, y : y + h, x : x + w]
        if boxes.noise is None:
            box.zero_()
        else:
            box.copy_(boxes.noise[used : used + box.numel()].view_as(box))
            used += box.numel()


def _erase_by_mask(images: torch.Tensor, boxes: Boxes) -> None:
    """The way of a GPU: a fixed number of kernels whatever the batch, and no size that the host would wait for."""
    place, y, x, h, w = boxes.table.unbind(1)
    chosen = images.index_select(0, place)
    steps = torch.arange(images.shape[-1], device=images.device)

    def within(first: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        return (steps >= first[:, None]) & (steps < (first + length)[:, None])

    inside = within(y, h)[:, None, :, None] & within(x, w)[:, None, None, :]
    if boxes.noise is None:
        chosen.masked_fill_(inside, 0.0)
    else:
        # takes the noise in the order of image, channel, row and column, which is the order that it is packed in
        chosen.masked_scatter_(inside.expand_as(chosen).contiguous(), boxes.noise)
    images.index_copy_(0, place, chosen)
