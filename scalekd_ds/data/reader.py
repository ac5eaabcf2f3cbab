"""Reads encoded images, caches small data sets in memory, and finds the images that cannot be read or decoded."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from nvidia.dali import Pipeline, fn, types
from PIL import Image, UnidentifiedImageError

from scalekd_ds.data.headers import encoded_size
from scalekd_ds.data.sources.source import Source
from scalekd_ds.data.undecodable import flaw_by_structure
from scalekd_ds.errors import UserError, first_line

# how files begin whose formats DALI decodes: JPEG, PNG, BMP, PNM, JPEG 2000; and WebP
_OF_DALI = (
    b"\xff\xd8\xff",
    b"\x89PNG",
    b"BM",
    *(b"P%d" % kind for kind in range(1, 7)),
    b"\x00\x00\x00\x0cjP  ",
    b"\xff\x4f\xff\x51",
)
# files whose sizes the estimate of a data set's size is taken from
_SIZE_SAMPLES = 64


class BadImageError(UserError):
    """A file is no image or cannot be read; `reason` completes the sentence "FILE ..."."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"image {name!r} {reason}. Mend or remove it.")
        self.reason = reason


class StorageGoneError(UserError):
    """The whole folder of the images cannot be read any more, as when a mount is lost; no single file is to blame."""


class Reader:
    """Reads the encoded bytes and the sizes of images.

    Threads may share one object: an entry of the caches is set in one operation, and always to the same value.

    Args:
        source: The images.
        keep_bytes: Size up to which the files of a source stay in memory once they are read. Of a larger source none
            stays, because a part of it saves no time.
    """

    def __init__(self, source: Source, keep_bytes: int) -> None:
        self.source = source
        self._cache: dict[int, np.ndarray] | None = {} if _estimated_bytes(source) <= keep_bytes else None
        # bytes of each image when its structure was checked
        self._checked = np.zeros(len(source), dtype=np.int64)
        # Hugging Face's sets have a name instead
        self._in_a_folder = source.root.exists()

    def encoded(self, index: int) -> np.ndarray:
        """The encoded bytes of one image, (bytes,) uint8.

        Raises:
            BadImageError: The file cannot be read, or its structure shows that no decoder can read it.
            StorageGoneError: The folder of the images cannot be read any more.
        """
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        try:
            data = self.source.read(index)
        except OSError as error:
            # what has no errno is about the image: a row without one, say
            if error.errno is not None and self._in_a_folder:
                _check_storage(self.source.root)
            raise BadImageError(self.source.name(index), f"cannot be read: {error.strerror or error}") from None
        # libraries of tables raise errors of their own for a damaged row
        except Exception as error:
            raise BadImageError(self.source.name(index), f"cannot be read: {first_line(error)}") from None
        # microseconds at each read, because DALI may crash at what was written there since; but for the checksums of a PNG
        if self._checked[index] != len(data) or data[:4].tobytes() != b"\x89PNG":
            # whole files may look cut off, as photos with a film behind them do: the decoders decide
            if flaw_by_structure(memoryview(data)) and (flaw := flaw_of(data)):
                raise BadImageError(self.source.name(index), flaw)
            self._checked[index] = len(data)
        try:
            data = _as_pillow_reads(data)
        except Exception as error:
            raise BadImageError(self.source.name(index), _reason(error)) from None
        if self._cache is not None:
            self._cache[index] = data
        return data

    def forget(self, indices: Sequence[int]) -> None:
        """Reads and checks these images anew when they are next asked for."""
        for index in indices:
            self._checked[index] = 0
            if self._cache is not None:
                self._cache.pop(index, None)

    def size(self, index: int, encoded: np.ndarray) -> tuple[int, int]:
        """(height, width) of one image in pixels, from the header in `encoded`, the bytes that were read of it.

        Raises:
            BadImageError: The header is not that of an image.
        """
        try:
            return encoded_size(memoryview(encoded))
        # Pillow raises errors of many kinds on damaged headers
        except Exception as error:
            raise BadImageError(self.source.name(index), _reason(error)) from None


def _check_storage(root: Path) -> None:
    """Raises StorageGoneError where the folder cannot be listed, or is empty as the folder of a lost mount is."""
    try:
        with os.scandir(root) as entries:
            problem = None if next(entries, None) else "it is empty now"
    except NotADirectoryError:
        return
    except OSError as error:
        problem = error.strerror or str(error)
    if problem:
        raise StorageGoneError(
            f"the images' folder {str(root)!r} cannot be read any more ({problem}): is its disk or mount gone? Once it "
            "is back, --run.resume auto goes on from the last checkpoint."
        )


def _as_pillow_reads(data: np.ndarray) -> np.ndarray:
    """An 8-bit PNG of an image that DALI does not read as Pillow does, and any other file as it is.

    Pillow converts 16-bit PNGs and PNMs by saturation, as in timm's and torchvision's loaders, where DALI would keep the high
    byte, and stretches PNMs whose largest value is below 255. Of TIFFs DALI does not read all that Pillow does, and of GIFs,
    AVIFs and others, which come under the names of JPEGs, none.
    """
    head = data[:64].tobytes()
    png_of_16_bits = head.startswith(b"\x89PNG\r\n\x1a\n") and len(head) > 24 and head[24] == 16
    # the header of a PNM is text: kind, width, height, largest value, with comments anywhere
    start = re.sub(rb"#[^\r\n]*", b"", data[:1024].tobytes()) if head[:1] == b"P" else b""
    pnm = re.match(rb"P[2356]\s+\d+\s+\d+\s+(\d+)\s", start)
    is_dalis = head.startswith(_OF_DALI) or head[8:12] == b"WEBP"
    if is_dalis and not png_of_16_bits and not (pnm and int(pnm[1]) != 255):
        return data
    out = io.BytesIO()
    with Image.open(io.BytesIO(data)) as image:
        image.convert("RGB").save(out, "PNG", compress_level=0)
    return np.frombuffer(out.getvalue(), dtype=np.uint8)


def _estimated_bytes(source: Source) -> float:
    """Estimated bytes of all files, from a few of them: a network file system takes minutes to give a million sizes."""
    sizes = []
    for index in range(0, len(source), max(1, len(source) // _SIZE_SAMPLES)):
        try:
            sizes.append(len(source.read(index)))
        # the error is reported when the image itself is needed
        except Exception:
            continue
    return len(source) * float(np.mean(sizes)) if sizes else 0.0


def flaw_of(data: np.ndarray) -> str | None:
    """Why a file cannot be decoded to RGB, by decoding it with Pillow; None where it can.

    Where the structure is suspect and Pillow decodes it nevertheless, DALI has to decode it as well.
    """
    flaw = flaw_by_structure(memoryview(data))
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.convert("RGB")
    # Pillow raises errors of many kinds on damaged files
    except Exception as error:
        return flaw or _reason(error)
    return flaw if flaw and not _count_decoded([_as_pillow_reads(data)]) else None


def _reason(error: Exception) -> str:
    """Completes the sentence "FILE ..." for an error of Pillow's."""
    if isinstance(error, UnidentifiedImageError):
        # Pillow's message is only the address of the buffer
        return "is no image"
    if isinstance(error, Image.DecompressionBombError):
        pixels = re.search(r"\d+", str(error))
        size = f"{int(pixels[0]) / 1e6:.0f} megapixels" if pixels else "its pixels"
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        return f"is too large: {size}, and at most {limit:.0f} are read, against decompression bombs; scale it down"
    return f"is damaged: {first_line(error)}"


def find_undecodable(
    source: Source, indices: Sequence[int], decoder: dict | None = None, device_id: int | None = None
) -> dict[int, str]:
    """Decodes samples one by one with Pillow and with DALI, whose own error need not name the file.

    Args:
        source: The images.
        indices: The samples to decode.
        decoder: Arguments of DALI's decoder; None decodes on the CPU.
        device_id: Number of the GPU that this decoder is on, or None.

    Returns:
        Index -> reason of those that cannot be decoded; a reason completes the sentence "FILE ...".
    """
    found: dict[int, str] = {}
    decodable: list[tuple[int, np.ndarray]] = []
    for index in indices:
        try:
            data = source.read(index)
        # OSError, or what a library of tables raises for a damaged row
        except Exception as error:
            found[index] = f"cannot be read: {getattr(error, 'strerror', None) or first_line(error)}"
            continue
        if flaw := flaw_of(data):
            found[index] = flaw
        else:
            decodable.append((index, _as_pillow_reads(data)))
    while decodable:
        # a pipeline cannot run after an error: the next one takes the files after the refused one
        count = _count_decoded([data for _, data in decodable], decoder, device_id)
        if count < len(decodable):
            found[decodable[count][0]] = "is refused by DALI's decoder"
        decodable = decodable[count + 1 :]
    return found


def _count_decoded(files: Sequence[np.ndarray], decoder: dict | None = None, device_id: int | None = None) -> int:
    """How many files DALI decodes before it refuses one; the arguments are those of `find_undecodable`."""
    decoder = decoder or {"device": "cpu", "output_type": types.RGB}
    remaining = iter(files)

    def next_file() -> list[np.ndarray]:
        return [next(remaining)]

    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=device_id, prefetch_queue_depth=1)
    with pipeline:
        encoded = fn.external_source(source=next_file, dtype=types.UINT8, ndim=1)
        pipeline.set_outputs(fn.decoders.image(encoded, **decoder))
    for decoded in range(len(files)):
        try:
            pipeline.run()
        except RuntimeError:
            return decoded
    return len(files)
