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

from scalekd_ds.data.headers import encoded_size, frame_of_jpeg
from scalekd_ds.data.sources.source import Source
from scalekd_ds.data.undecodable import flaw_by_structure, what_is_no_image
from scalekd_ds.errors import UserError, first_line

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
        # images that DALI refuses and Pillow reads
        self._by_pillow: set[int] = set()
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
            if flaw_by_structure(memoryview(data.data)):
                if flaw := flaw_of(data):
                    raise BadImageError(self.source.name(index), flaw)
                if _is_dalis(data) and not _count_decoded([data]):
                    self._by_pillow.add(index)
            self._checked[index] = len(data)
        try:
            if index in self._by_pillow or not _is_dalis(data):
                data = _as_png(data)
        except Exception as error:
            raise BadImageError(self.source.name(index), _reason(error, data)) from None
        if self._cache is not None:
            self._cache[index] = data
        return data

    def forget(self, indices: Sequence[int]) -> None:
        """Reads and checks these images anew when they are next asked for."""
        for index in indices:
            self._checked[index] = 0
            if self._cache is not None:
                self._cache.pop(index, None)

    def take_refused(self, indices: Sequence[int], decoder: dict, device_id: int | None) -> bool:
        """Has Pillow read those of the images that Pillow decodes and DALI refuses; whether there is a new one.

        Args:
            indices: Images that Pillow decodes.
            decoder: Arguments of DALI's decoder.
            device_id: Number of the GPU that this decoder is on, or None.
        """
        asked = [index for index in indices if index not in self._by_pillow]
        refused = []
        while asked:
            # a pipeline cannot run after an error: the next one takes the files after the refused one
            count = _count_decoded([self.encoded(index) for index in asked], decoder, device_id)
            refused += asked[count : count + 1]
            asked = asked[count + 1 :]
        self._by_pillow.update(refused)
        self.forget(refused)
        return bool(refused)

    def size(self, index: int, encoded: np.ndarray) -> tuple[int, int]:
        """(height, width) of one image in pixels, from the header in `encoded`, the bytes that were read of it.

        Raises:
            BadImageError: The header is not that of an image.
        """
        try:
            return encoded_size(memoryview(encoded.data))
        # Pillow raises errors of many kinds on damaged headers
        except Exception as error:
            raise BadImageError(self.source.name(index), _reason(error, encoded)) from None


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


def _is_dalis(data: np.ndarray) -> bool:
    """Whether DALI reads images of this kind as Pillow does, which timm's and torchvision's loaders use.

    Those are JPEGs, PNGs of 8 bits, WebP and the plain kinds of PNM. DALI keeps the high byte of 16 bits, where Pillow
    saturates; it inverts every CMYK, and not those of Adobe alone; it refuses or misreads kinds of BMP, JPEG 2000, TIFF and
    PNM, and knows no GIF and no AVIF, which come under the names of JPEGs.
    """
    head = data[:64].tobytes()
    if head.startswith(b"\xff\xd8\xff"):
        frame = frame_of_jpeg(memoryview(data.data))
        return frame is None or frame.colours != 4
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return len(head) > 24 and head[24] != 16
    # the header of a PNM is text: kind, width, height, largest value, with comments anywhere
    start = re.sub(rb"#[^\r\n]*", b"", data[:1024].tobytes()) if head[:1] == b"P" else b""
    return head[8:12] == b"WEBP" or re.match(rb"P[56]\s+\d+\s+\d+\s+255\s", start) is not None


def _as_png(data: np.ndarray) -> np.ndarray:
    """An 8-bit PNG of an image as Pillow reads it."""
    out = io.BytesIO()
    with Image.open(io.BytesIO(data.data)) as image:
        pixels = image.convert("RGB")
    # a transparent grey value has no place among the colours that it was converted to
    pixels.info = {}
    pixels.save(out, "PNG", compress_level=0)
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
    """Why a file cannot be decoded to RGB, by decoding it with Pillow; None where it can."""
    try:
        with Image.open(io.BytesIO(data.data)) as image:
            image.convert("RGB")
    # Pillow raises errors of many kinds on damaged files
    except Exception as error:
        return flaw_by_structure(memoryview(data.data)) or _reason(error, data)
    return None


def _reason(error: Exception, data: np.ndarray) -> str:
    """Completes the sentence "FILE ..." for an error of Pillow's."""
    if isinstance(error, UnidentifiedImageError):
        # Pillow's message is only the address of the buffer
        return what_is_no_image(memoryview(data.data))
    if isinstance(error, Image.DecompressionBombError):
        pixels = re.search(r"\d+", str(error))
        size = f"{int(pixels[0]) / 1e6:.0f} megapixels" if pixels else "its pixels"
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        return f"is too large: {size}, and at most {limit:.0f} are read, against decompression bombs; scale it down"
    return f"is damaged: {first_line(error)}"


def find_undecodable(source: Source, indices: Sequence[int]) -> dict[int, str]:
    """Decodes samples one by one with Pillow, which decides: what it decodes and DALI does not is read by it.

    Args:
        source: The images.
        indices: The samples to decode.

    Returns:
        Index -> reason of those that cannot be decoded; a reason completes the sentence "FILE ...".
    """
    found: dict[int, str] = {}
    for index in indices:
        try:
            data = source.read(index)
        # OSError, or what a library of tables raises for a damaged row
        except Exception as error:
            found[index] = f"cannot be read: {getattr(error, 'strerror', None) or first_line(error)}"
            continue
        if flaw := flaw_of(data):
            found[index] = flaw
    return found


def _count_decoded(files: Sequence[np.ndarray], decoder: dict | None = None, device_id: int | None = None) -> int:
    """How many files DALI decodes before it refuses one, on the CPU without a `decoder`."""
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
