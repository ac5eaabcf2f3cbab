"""Encoded images, tars and tables of them that tests write, and a folder whose modes hold for root too."""

from __future__ import annotations

import importlib.util
import io
import os
import shutil
import stat
import struct
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


def example(**features) -> bytes:
    """A tf.train.Example in protocol buffers' own encoder; names have `/` for `__`."""
    message_of = pytest.importorskip("google.protobuf.message_factory", reason="protobuf is not installed")
    from google.protobuf import descriptor_pb2, descriptor_pool

    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")
    shapes = {
        "BytesList": [("value", 1, kinds.TYPE_BYTES, True, None)],
        "FloatList": [("value", 2, kinds.TYPE_FLOAT, True, None)],
        "Int64List": [("value", 1, kinds.TYPE_INT64, True, None)],
        "Feature": [
            ("bytes_list", 1, kinds.TYPE_MESSAGE, False, ".t.BytesList"),
            ("int64_list", 3, kinds.TYPE_MESSAGE, False, ".t.Int64List"),
        ],
        "Entry": [
            ("key", 1, kinds.TYPE_STRING, False, None),
            ("value", 2, kinds.TYPE_MESSAGE, False, ".t.Feature"),
        ],
        "Features": [("feature", 1, kinds.TYPE_MESSAGE, True, ".t.Entry")],
        "Example": [("features", 1, kinds.TYPE_MESSAGE, False, ".t.Features")],
    }
    for name, fields in shapes.items():
        shape = file.message_type.add(name=name)
        for field, number, kind, repeated, type_name in fields:
            label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            shape.field.add(name=field, number=number, type=kind, label=label, type_name=type_name)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    made = message_of.GetMessageClass(pool.FindMessageTypeByName("t.Example"))()
    for name, value in features.items():
        entry = made.features.feature.add(key=name.replace("__", "/"))
        if isinstance(value, bytes):
            entry.value.bytes_list.value.append(value)
        else:
            entry.value.int64_list.value.append(value)
    return made.SerializeToString()


def write_records(path: Path, records: list[bytes]) -> Path:
    """A TFRecord of these records, whose checksums nobody reads."""
    framed = [struct.pack("<QI", len(record), 0) + record + struct.pack("<I", 0) for record in records]
    path.write_bytes(b"".join(framed))
    return path


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
