"""Cheap checks of an encoded image, which find most undecodable files before a decoder sees them.

DALI stops the whole pipeline at a file that it cannot decode, and version 2.4 has been seen to crash the process where
several of them are in a batch. The checks cost microseconds for a JPEG, and a checksum for a PNG.
"""

from __future__ import annotations

import zlib

from scalekd_ds.data.headers import frame_of_jpeg
from scalekd_ds.files.mistaken import HEAD, mistaken

# trailing bytes in which the end marker of a JPEG is searched: some writers append metadata
_TAIL = 1 << 16
_PNG = b"\x89PNG\r\n\x1a\n"
_KINDS = {
    b"\xff\xd8\xff": "JPEG",
    _PNG: "PNG",
    b"GIF8": "GIF",
    b"II*\x00": "TIFF",
    b"MM\x00*": "TIFF",
    b"BM": "BMP",
    b"\x00\x00\x00\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
}


def flaw_by_structure(data: memoryview) -> str | None:
    """What the structure of an encoded image shows to be wrong with it.

    Args:
        data: The whole file.

    Returns:
        A reason that completes the sentence "FILE ...", or None where nothing is wrong.
    """
    head = bytes(data[:16])
    if not head:
        return "is empty"
    if head.startswith(b"\xff\xd8\xff"):
        return None if bytes(data[-_TAIL:]).rfind(b"\xff\xd9") >= 0 else "is cut off: it has no end of image"
    if head.startswith(_PNG):
        return _flaw_of_png(data)
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return (
            None if int.from_bytes(head[4:8], "little") + 8 <= len(data) else "is cut off: it is shorter than it says"
        )
    if head.startswith(b"BM"):
        return None if int.from_bytes(head[2:6], "little") <= len(data) else "is cut off: it is shorter than it says"
    # AVIF and HEIC, which Pillow reads where it was built with their libraries
    if head[4:8] == b"ftyp":
        return "has a format without a decoder here: JPEG, PNG, WebP, BMP, GIF, PNM and TIFF have one"
    if head.startswith((b"GIF8", b"II*\x00", b"MM\x00*", b"\x00\x00\x00\x0cjP  ", b"\xff\x4f\xff\x51")):
        return None
    # PNM; Pillow and DALI look at the rest
    if len(head) > 3 and head[:1] == b"P" and head[1:2] in b"123456" and head[2:3].isspace():
        return None
    return what_is_no_image(data)


def what_is_no_image(data: memoryview) -> str:
    """What a file is in which Pillow finds no image; completes the sentence "FILE ..."."""
    start = bytes(data[:HEAD])
    if other := mistaken(start, "images"):
        return other
    frame = frame_of_jpeg(data)
    if frame is not None and frame.bits != 8:
        return f"is a JPEG of {frame.bits} bits a colour, for which there is no decoder here: save it with 8"
    if kind := next((name for magic, name in _KINDS.items() if start.startswith(magic)), None):
        return f"is damaged: it begins as a {kind}, and has no image of one that can be read"
    return "is no image"


def _flaw_of_png(data: memoryview) -> str | None:
    """The same for a PNG, whose chunks each carry a checksum."""
    place = len(_PNG)
    while place + 12 <= len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        end = place + 12 + length
        if end > len(data):
            break
        if zlib.crc32(data[place + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            return f"is damaged: a checksum is wrong at byte {place}"
        if data[place + 4 : place + 8] == b"IEND":
            return None
        place = end
    return "is cut off: it has no end of image"
