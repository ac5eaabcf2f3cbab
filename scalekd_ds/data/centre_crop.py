"""Which part of an image evaluation and inspection see: torchvision's Resize and CenterCrop."""

from __future__ import annotations

from typing import NamedTuple

# how many times as long as its crop a resized image may be before only a part of it is resized
_LONG = 16


class View(NamedTuple):
    """What is resized of an image, to which size, and where its crop is then; all (y, x).

    Attributes:
        start, end: The part of the image, in its pixels.
        size: Height and width to which this part is resized.
        anchor: Corner of the crop in what is resized.
    """

    start: tuple[float, float]
    end: tuple[float, float]
    size: tuple[int, int]
    anchor: tuple[int, int]


def centre_view(height: int, width: int, shorter: int, side: int) -> View:
    """The view of an image by Resize(shorter) and CenterCrop(side), as torchvision has them.

    Of an image that is many times as long as it is high, only the part that is seen is resized: a scan line of 20000x1
    would be 4 GB before its crop. The pixels are the same, within the rounding of places.
    """
    whole, size, anchor = (height, width), *_centre_crop(height, width, shorter, side)
    start, end, sizes, anchors = [], [], [], []
    for length, resized, first in zip(whole, size, anchor, strict=True):
        long = resized > _LONG * side
        start.append(first * length / resized if long else 0.0)
        end.append((first + side) * length / resized if long else float(length))
        sizes.append(side if long else resized)
        anchors.append(0 if long else first)
    return View((start[0], start[1]), (end[0], end[1]), (sizes[0], sizes[1]), (anchors[0], anchors[1]))


def _centre_crop(height: int, width: int, shorter: int, side: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The size after Resize(shorter) and the corner of CenterCrop(side), both (y, x), rounded as torchvision does."""
    if height <= width:
        size = shorter, int(shorter * width / height)
    else:
        size = int(shorter * height / width), shorter
    return size, (round((size[0] - side) / 2.0), round((size[1] - side) / 2.0))
