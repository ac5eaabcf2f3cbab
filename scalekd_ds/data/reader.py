"""Encoded images from disk: read once where they fit in memory, and named where they cannot be read or decoded."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence

import numpy as np
from nvidia.dali import Pipeline, fn, types
from PIL import Image, UnidentifiedImageError

from scalekd_ds.errors import UserError

# Small sets, such as 60,000 images of 32x32, are kept whole; a set that does not fit gains nothing from a part of it.
KEEP_BYTES = 512 * 2**20
_ESTIMATE_FROM = 64


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

    def encoded(self, index: int) -> np.ndarray:
        """(bytes,) uint8 of one file.

        Raises:
            UserError: The file cannot be read.
        """
        if self._kept is not None and index in self._kept:
            return self._kept[index]
        try:
            data = np.fromfile(self.paths[index], dtype=np.uint8)
        except OSError as error:
            raise UserError(f"image {self.paths[index]!r} cannot be read: {error.strerror}.") from None
        if self._kept is not None:
            self._kept[index] = data
        return data

    def size(self, index: int, encoded: np.ndarray) -> tuple[int, int]:
        """(height, width) of one image in pixels, from the header alone.

        Raises:
            UserError: There is no header of an image.
        """
        height, width = self._sizes[index].tolist()
        if height == 0:
            try:
                with Image.open(io.BytesIO(encoded)) as image:
                    height, width = image.height, image.width
            except (OSError, Image.DecompressionBombError) as error:
                # what Pillow says then is the address of the buffer
                reason = "is no image" if isinstance(error, UnidentifiedImageError) else f"is damaged: {error}"
                raise UserError(f"image {self.paths[index]!r} {reason}. Mend or remove it.") from None
            self._sizes[index] = height, width
        return height, width


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


def first_bad(paths: Sequence[str]) -> str | None:
    """The first file that Pillow or DALI cannot decode; the message of DALI's own error need not name it."""
    for path in paths:
        try:
            with Image.open(path) as image:
                image.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            return path
    # formats that Pillow knows and DALI does not, such as a GIF that is named .jpg
    return next((path for path in paths if not _dali_decodes(path)), None)


def _dali_decodes(path: str) -> bool:
    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    with pipeline:
        encoded = fn.external_source(source=lambda: [np.fromfile(path, dtype=np.uint8)], dtype=types.UINT8, ndim=1)
        pipeline.set_outputs(fn.decoders.image(encoded, device="cpu", output_type=types.RGB))
    try:
        pipeline.run()
    except RuntimeError:
        return False
    return True
