"""Encoded images, tars and tables of them that tests write, and a folder whose modes hold for root too."""

from __future__ import annotations

import importlib.util
import io
import os
import shutil
import stat
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from image_fixtures import picture

from scalekd_ds.data.sources.open import open_source
from scalekd_ds.errors import UserError

SHAPES = [(32, 40), (41, 33), (50, 36), (37, 37), (64, 48), (33, 47)]

needs_pyarrow = pytest.mark.skipif(not importlib.util.find_spec("pyarrow"), reason="pyarrow is not installed")
needs_datasets = pytest.mark.skipif(not importlib.util.find_spec("datasets"), reason="datasets is not installed")


def _encoded() -> list[bytes]:
    rng = np.random.default_rng(0)
    encoded = []
    for height, width in SHAPES:
        file = io.BytesIO()
        picture(rng, height, width).save(file, "JPEG")
        encoded.append(file.getvalue())
    return encoded


# one of each of SHAPES
JPEGS = _encoded()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """A tar of (name, bytes)."""
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def labelled(labels: list) -> list[tuple[str, bytes]]:
    """Members as WebDataset has them: an image and its .cls for each label."""
    members = []
    for i, label in enumerate(labels):
        members += [(f"{i:04d}.jpg", JPEGS[i % 6]), (f"{i:04d}.cls", str(label).encode())]
    return members


def write_table(root: Path, rows: list[tuple[str, object]], name: str = "table.csv", separator: str = ",") -> Path:
    """A table of (path, label), and the files below `root` that it names and that are not there."""
    for path, _ in rows:
        if not os.path.isabs(path) and ".." not in path and not (root / path).exists():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(JPEGS[0])
    lines = [separator.join(("label", "path")), *(separator.join((str(label), path)) for path, label in rows)]
    (root / name).write_text("\n".join(lines) + "\n")
    return root / name


def message(what: str | Path, *args, **kwargs) -> str:
    """The one line that a UserError says."""
    with pytest.raises(UserError) as error:
        open_source(what, "data.train", *args, **kwargs)
    text = str(error.value)
    assert text.startswith("data.train: ") and "\n" not in text
    return text


@contextmanager
def as_nobody() -> Iterator[tuple[Path, Callable[[], None]]]:
    """A new folder, and a function that gives up root's rights until the block ends: modes in the folder hold then."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    root = os.geteuid() == 0
    try:
        yield folder, (lambda: os.seteuid(65534) if root else None)
    finally:
        if root:
            os.seteuid(0)
        for path in [folder, *folder.rglob("*")]:
            path.chmod(path.stat().st_mode | stat.S_IRWXU)
        shutil.rmtree(folder)
