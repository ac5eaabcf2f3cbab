"""Encoded images from disk: read once where they fit in memory, and named where they cannot be read or decoded."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from nvidia.dali import Pipeline, fn, types
from PIL import Image, UnidentifiedImageError

from scalekd_ds.data.sources.source import Source
from scalekd_ds.data.undecodable import flaw_by_structure
from scalekd_ds.errors import UserError

_ESTIMATE_FROM = 64


class BadImageError(UserError):
    """A file that is no image or cannot be read; `reason` completes "FILE ..."."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"image {name!r} {reason}. Mend or remove it.")
        self.reason = reason


class StorageGoneError(UserError):
    """The images' folder has gone: a lost mount, not a bad file."""


class Reader:
    """Encoded bytes and sizes of images. Threads may share it: each entry is written whole, and is the same each time.

    Args:
        source: The images.
        keep_bytes: Sets below this many bytes stay in memory once they are read; one that does not fit gains nothing
            from a part of it.
    """

    def __init__(self, source: Source, keep_bytes: int) -> None:
        self.source = source
        self._kept: dict[int, np.ndarray] | None = {} if _estimate(source) <= keep_bytes else None
        self._sound = np.zeros(len(source), dtype=bool)

    def encoded(self, index: int) -> np.ndarray:
        """(bytes,) uint8 of one file.

        Raises:
            BadImageError: The file cannot be read, or no decoder could take it.
            StorageGoneError: Nor can the folder of the images.
        """
        if self._kept is not None and index in self._kept:
            return self._kept[index]
        try:
            data = self.source.read(index)
        except OSError as error:
            _check_storage(self.source.root)
            raise BadImageError(self.source.name(index), f"cannot be read: {error.strerror or error}") from None
        if not self._sound[index]:
            if flaw := flaw_by_structure(memoryview(data)):
                raise BadImageError(self.source.name(index), flaw)
            self._sound[index] = True
        data = _as_pillow_reads_it(data)
        if self._kept is not None:
            self._kept[index] = data
        return data

    def size(self, index: int, encoded: np.ndarray) -> tuple[int, int]:
        """(height, width) of one image in pixels, from the index, or else from the header alone.

        Raises:
            BadImageError: There is no header of an image.
        """
        # opening a header costs more than the draw of a crop
        height, width = self.source.sizes[index].tolist()
        if height == 0:
            try:
                with Image.open(io.BytesIO(encoded)) as image:
                    height, width = image.height, image.width
            except (OSError, Image.DecompressionBombError) as error:
                # what Pillow says then is the address of the buffer
                reason = "is no image" if isinstance(error, UnidentifiedImageError) else f"is damaged: {error}"
                raise BadImageError(self.source.name(index), reason) from None
            self.source.sizes[index] = height, width
        return height, width


def _check_storage(root: Path) -> None:
    """Raises StorageGoneError where the folder cannot be listed any more, or is empty as a lost mount's is."""
    try:
        with os.scandir(root) as entries:
            problem = None if next(entries, None) else "it is empty now"
    except NotADirectoryError:
        return
    except OSError as error:
        problem = error.strerror or str(error)
    if problem:
        raise StorageGoneError(
            f"the images' folder {str(root)!r} cannot be read any more ({problem}): is its disk or mount gone? Once it is "
            "back, --run.resume auto goes on from the last checkpoint."
        )


def _as_pillow_reads_it(data: np.ndarray) -> np.ndarray:
    """The file, or a PNG of 16 bits as one of 8: DALI keeps the high byte where Pillow saturates."""
    png_of_16_bits = data[:8].tobytes() == b"\x89PNG\r\n\x1a\n" and len(data) > 24 and data[24] == 16
    if not png_of_16_bits:
        return data
    out = io.BytesIO()
    with Image.open(io.BytesIO(data)) as image:
        image.convert("RGB").save(out, "PNG", compress_level=0)
    return np.frombuffer(out.getvalue(), dtype=np.uint8)


def _estimate(source: Source) -> float:
    """Bytes of all files, from a few of them: asking a network file system for a million sizes takes minutes."""
    sizes = []
    for index in range(0, len(source), max(1, len(source) // _ESTIMATE_FROM)):
        try:
            sizes.append(len(source.read(index)))
        except OSError:
            # whoever reads the file names it
            continue
    return len(source) * float(np.mean(sizes)) if sizes else 0.0


def flaw_of(data: np.ndarray) -> str | None:
    """What keeps a whole file from being decoded to RGB, by its structure or by Pillow; None where nothing does."""
    if flaw := flaw_by_structure(memoryview(data)):
        return flaw
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.convert("RGB")
    except UnidentifiedImageError:
        return "is no image"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"is damaged: {error}"
    return None


def undecodable(source: Source, indices: Sequence[int]) -> dict[int, str]:
    """Index -> reason of the files that Pillow or DALI cannot decode; DALI's own error need not name them."""
    found: dict[int, str] = {}
    sound: list[tuple[int, np.ndarray]] = []
    for index in indices:
        try:
            data = source.read(index)
        except OSError as error:
            found[index] = f"cannot be read: {error.strerror or error}"
            continue
        if flaw := flaw_of(data):
            found[index] = flaw
        else:
            sound.append((index, data))
    while sound:
        # a pipeline is of no use after an error: the next one takes the files after it
        decoded = _decode_until_refused([data for _, data in sound])
        if decoded < len(sound):
            found[sound[decoded][0]] = "is refused by DALI's decoder"
        sound = sound[decoded + 1 :]
    return found


def _decode_until_refused(files: Sequence[np.ndarray]) -> int:
    waiting = iter(files)

    def one() -> list[np.ndarray]:
        return [next(waiting)]

    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    with pipeline:
        encoded = fn.external_source(source=one, dtype=types.UINT8, ndim=1)
        pipeline.set_outputs(fn.decoders.image(encoded, device="cpu", output_type=types.RGB))
    for decoded in range(len(files)):
        try:
            pipeline.run()
        except RuntimeError:
            return decoded
    return len(files)
