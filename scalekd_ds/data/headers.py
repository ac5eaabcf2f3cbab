"""Height, width and colours from the first bytes of an encoded image.

A size is read whenever an image is, from the bytes that are decoded next. An index of sizes would be wrong for a file that
was written again since, and DALI's whole pipeline stops at a crop outside of an image.
"""

from __future__ import annotations

import io
from typing import NamedTuple

from PIL import Image

# start-of-frame markers of a JPEG, which hold its size; the others in their range are tables
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def encoded_size(data: memoryview) -> tuple[int, int]:
    """(height, width) in pixels of a whole encoded image, as its decoder will give them.

    Raises:
        OSError: Pillow finds no image in the bytes.
        PIL.Image.DecompressionBombError: The image is too large.
    """
    # 1 us in place of Pillow's 23, in which no other thread of Python runs: at thousands of images a second this counts
    frame = frame_of_jpeg(data)
    size = frame.size if frame else None
    # the limit against decompression bombs is Pillow's, and so is the message
    if size is None or min(size) <= 0 or size[0] * size[1] > (Image.MAX_IMAGE_PIXELS or 0):
        with Image.open(io.BytesIO(data)) as image:
            size = image.height, image.width
    return size


class JpegFrame(NamedTuple):
    """What the frame header of a JPEG says: (height, width), bits of a sample, number of colours."""

    size: tuple[int, int]
    bits: int
    colours: int


def frame_of_jpeg(data: memoryview) -> JpegFrame | None:
    """The frame header of a JPEG, None for other images and where its segments do not lead there."""
    at, end = 2, len(data)
    if bytes(data[:2]) != b"\xff\xd8":
        return None
    while at + 10 <= end and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:
            # filling before a marker
            at += 1
        elif marker in _FRAMES:
            size = data[at + 5] << 8 | data[at + 6], data[at + 7] << 8 | data[at + 8]
            return JpegFrame(size, data[at + 4], data[at + 9])
        elif marker < 0xC0 or 0xD0 <= marker <= 0xDA:
            # a marker without a length, or the pixels before any size
            return None
        else:
            at += 2 + (data[at + 2] << 8 | data[at + 3])
    return None
