"""Encoded images from disk: read once where they fit in memory, and named where they cannot be read or decoded."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence

import numpy as np
from nvidia.dali import Pipeline, fn, types
from PIL import Image, UnidentifiedImageError

from scalekd_ds.data.structure import flaw_by_structure
from scalekd_ds.errors import UserError

# Small sets, such as 60,000 images of 32x32, are kept whole; a set that does not fit gains nothing from a part of it.
KEEP_BYTES = 512 * 2**20
_ESTIMATE_FROM = 64


class BadImageError(UserError):
    """A file that is no image or cannot be read; `reason` completes "FILE ..."."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"image {name!r} {reason}. Mend or remove it.")
        self.reason = reason


class Reader:
    """Encoded bytes and sizes of images. Threads may share it: each entry is written whole, and is the same each time.

    Args:
        paths: The files.
        keep_bytes: Sets below this many bytes stay in memory once they are read.
    """

    def __init__(self, paths: Sequence[str], keep_bytes: int = KEEP_BYTES) -> None:
        self.paths = paths
        self._kept: dict[int, np.ndarray] | None = {} if _estimate(paths) <= keep_bytes else None
        # (n, 2) height and width, 0 where not yet known: opening a header costs more than the draw of a crop
        self._sizes = np.zeros((len(paths), 2), dtype=np.int32)
        self._sound = np.zeros(len(paths), dtype=bool)

    def encoded(self, index: int) -> np.ndarray:
        """(bytes,) uint8 of one file.

        Raises:
            BadImageError: The file cannot be read, or no decoder could take it.
        """
        if self._kept is not None and index in self._kept:
            return self._kept[index]
        try:
            data = np.fromfile(self.paths[index], dtype=np.uint8)
        except OSError as error:
            raise BadImageError(self.paths[index], f"cannot be read: {error.strerror}") from None
        if not self._sound[index]:
            if flaw := flaw_by_structure(memoryview(data)):
                raise BadImageError(self.paths[index], flaw)
            self._sound[index] = True
        data = _as_pillow_reads_it(data)
        if self._kept is not None:
            self._kept[index] = data
        return data

    def size(self, index: int, encoded: np.ndarray) -> tuple[int, int]:
        """(height, width) of one image in pixels, from the header alone.

        Raises:
            BadImageError: There is no header of an image.
        """
        height, width = self._sizes[index].tolist()
        if height == 0:
            try:
                with Image.open(io.BytesIO(encoded)) as image:
                    height, width = image.height, image.width
            except (OSError, Image.DecompressionBombError) as error:
                # what Pillow says then is the address of the buffer
                reason = "is no image" if isinstance(error, UnidentifiedImageError) else f"is damaged: {error}"
                raise BadImageError(self.paths[index], reason) from None
            self._sizes[index] = height, width
        return height, width


def _as_pillow_reads_it(data: np.ndarray) -> np.ndarray:
    """The file, or a PNG of 16 bits as one of 8: DALI keeps the high byte where Pillow saturates."""
    png_of_16_bits = data[:8].tobytes() == b"\x89PNG\r\n\x1a\n" and len(data) > 24 and data[24] == 16
    if not png_of_16_bits:
        return data
    out = io.BytesIO()
    with Image.open(io.BytesIO(data)) as image:
        image.convert("RGB").save(out, "PNG", compress_level=0)
    return np.frombuffer(out.getvalue(), dtype=np.uint8)


def _estimate(paths: Sequence[str]) -> float:
    """Bytes of all files, from a few of them: asking a network file system for a million sizes takes minutes."""
    sizes = []
    for path in paths[:: max(1, len(paths) // _ESTIMATE_FROM)]:
        try:
            sizes.append(os.path.getsize(path))
        except OSError:
            # whoever reads the file names it
            continue
    return len(paths) * float(np.mean(sizes)) if sizes else 0.0


def flaw_of(path: str) -> str | None:
    """What keeps a whole file from being decoded to RGB, by its structure or by Pillow; None where nothing does."""
    try:
        with open(path, "rb") as file:
            data = file.read()
        if flaw := flaw_by_structure(memoryview(data)):
            return flaw
        with Image.open(io.BytesIO(data)) as image:
            image.convert("RGB")
    except UnidentifiedImageError:
        return "is no image"
    except OSError as error:
        return f"cannot be read: {error.strerror}" if error.strerror else f"is damaged: {error}"
    except (SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"is damaged: {error}"
    return None


def undecodable(paths: Sequence[str]) -> dict[str, str]:
    """Path -> reason of the files that Pillow or DALI cannot decode; the message of DALI's own error need not name them."""
    found = {path: flaw for path in paths if (flaw := flaw_of(path))}
    # formats that Pillow knows and DALI does not, such as a GIF that is named .jpg
    found |= dict.fromkeys(
        not_for_dali([path for path in paths if path not in found]), "has a format without a decoder"
    )
    return found


def not_for_dali(paths: Sequence[str]) -> list[str]:
    """Those of the files that DALI's decoder refuses."""
    refused, left = [], list(paths)
    while left:
        # a pipeline is of no use after an error: the next one takes the files after it
        decoded = _decode_until_refused(left)
        refused += left[decoded : decoded + 1]
        left = left[decoded + 1 :]
    return refused


def _decode_until_refused(paths: Sequence[str]) -> int:
    waiting = iter(paths)

    def one() -> list[np.ndarray]:
        return [np.fromfile(next(waiting), dtype=np.uint8)]

    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    with pipeline:
        encoded = fn.external_source(source=one, dtype=types.UINT8, ndim=1)
        pipeline.set_outputs(fn.decoders.image(encoded, device="cpu", output_type=types.RGB))
    for decoded in range(len(paths)):
        try:
            pipeline.run()
        except RuntimeError:
            return decoded
    return len(paths)
