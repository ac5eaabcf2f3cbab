"""TFRecord files of tf.train.Example, as TensorFlow's scripts write ImageNet, parsed without TensorFlow.

The records of a file are scanned once for the places of their images, which are then read as in any shard. A record is
its length (uint64), a checksum, an Example and a checksum. An Example is a protocol buffer message whose map `features`
holds image/encoded, and image/class/synset (a name) or image/class/label (a number).
"""

from __future__ import annotations

import mmap
import os
import re
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

from scalekd_ds.data.sources.index import reason
from scalekd_ds.data.sources.shards import Sample, ShardSource, open_shards
from scalekd_ds.data.sources.what_counts import is_left_by_systems
from scalekd_ds.errors import UserError
from scalekd_ds.files.mistaken import HEAD, mistaken
from scalekd_ds.names import escape, text_of

_FILE_NAME = re.compile(r".*\.tfrec(ords?)?|.*-[\d{}.]+-of-\d+(\.tfrec(ords?)?)?", re.IGNORECASE)
# bytes before and after the Example of a record
_HEADER, _FOOTER = 12, 4
_IMAGE, _SYNSET, _LABEL = b"image/encoded", b"image/class/synset", b"image/class/label"


def is_tfrecord(path: Path) -> bool:
    """Whether the path of a file or a pattern is named as TFRecords are."""
    name = path.name
    return _FILE_NAME.fullmatch(name) is not None and not is_left_by_systems(name) and not path.is_dir()


def open_tfrecords(where: Path, key: str, classes: list[str] | None = None) -> ShardSource:
    """Opens TFRecord files of encoded images.

    Args:
        where: A folder of *.tfrecord or *-of-*, one such file, or a pattern with a range such as {000..012}.
        key: Setting that names the source, for error messages.
        classes: Names of the classes; None takes them from a classes.txt beside the files, or from the labels.

    Raises:
        UserError: A file is missing, cut off or no TFRecord; a record has no image or label; a label is out of range; some
            records have a synset and others a number alone.
    """
    # feature of labels -> a record that has its label there
    ways: dict[bytes, str] = {}
    return open_shards(where, key, classes, is_tfrecord, lambda file: (_scan(file, key, ways), {}))


def _scan(path: str, key: str, ways: dict[bytes, str]) -> list[Sample]:
    """All images of one file."""
    samples: list[Sample] = []
    try:
        # mapped into memory, so that the pages with pixels are not read
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for start, end in _records(data):
                sample, feature = _sample(data, start, end, len(samples))
                samples.append(sample)
                ways.setdefault(feature, f"{sample.name} of {path!r}")
                if len(ways) == 2:
                    raise UserError(
                        f"{key}: {ways[_SYNSET]} has its class as a synset, and {ways[_LABEL]} as a number alone: name the "
                        "classes of all records in the same way."
                    )
    except (ValueError, IndexError, struct.error) as error:
        with open(path, "rb") as file:
            if other := mistaken(file.read(HEAD), "images"):
                raise UserError(f"{key}: {path!r} {other}.") from None
        where = f"record {len(samples)} of {path!r}"
        raise UserError(f"{key}: {where} is no tf.train.Example of an image: {error or 'it is cut off'}.") from None
    except OSError as error:
        raise UserError(f"{key}: {path!r} cannot be read: {reason(error)}.") from None
    return samples


def _records(data: mmap.mmap) -> Iterator[tuple[int, int]]:
    """(first byte, end) of the Example in each record."""
    at = 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        end = at + _HEADER + length
        if end + _FOOTER > len(data):
            raise ValueError(
                f"it is cut off, or the file is no TFRecord: {length} bytes from byte {at} on pass its end"
            )
        yield at + _HEADER, end
        at = end + _FOOTER


def _sample(data: mmap.mmap, start: int, end: int, number: int) -> tuple[Sample, bytes]:
    """The image in the Example from byte `start` to `end`, and the feature with its label; ValueError where it is none."""
    features: dict[bytes, tuple[int, int]] = {}
    for _, first, last in _fields(data, start, end):
        for _, *entry in _fields(data, first, last):
            parts = {field: (a, b) for field, a, b in _fields(data, *entry)}
            if 1 in parts and 2 in parts:
                features[data[slice(*parts[1])]] = parts[2]
    if _IMAGE not in features:
        raise ValueError(f"it has no {_IMAGE.decode()}{_instead(features)}")
    first, last = _first_bytes(data, *features[_IMAGE])
    label, feature = "", _SYNSET
    if _SYNSET in features:
        label = data[slice(*_first_bytes(data, *features[_SYNSET]))].decode("utf-8", "surrogateescape")
    # scripts that know no synset write an empty one
    if not label and _LABEL in features:
        label, feature = str(_first_int(data, *features[_LABEL])), _LABEL
    if not label:
        raise ValueError(f"it has neither {_SYNSET.decode()} nor {_LABEL.decode()}{_instead(features)}")
    return Sample(f"record {number}", label, last - first, first), feature


def _instead(features: Iterable[bytes]) -> str:
    names = ", ".join(sorted(escape(text_of(os.fsdecode(name))) for name in features))
    return f", but {names:.200}" if names else ""


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    """The variable-length integer at byte `at`, and the byte after it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a number has more than ten bytes")


def _fields(data: mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(field number, first byte, end) of each field of a message; for an integer these are the bytes that encode it."""
    while at < end:
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 2:
            length, at = _varint(data, at)
            last = at + length
        elif kind == 0:
            last = _varint(data, at)[1]
        elif kind in (1, 5):
            last = at + (8 if kind == 1 else 4)
        else:
            raise ValueError(f"a field has the wire type {kind}")
        if last > end:
            raise ValueError("a field passes the record's end")
        yield tag >> 3, at, last
        at = last


def _first_bytes(data: mmap.mmap, start: int, end: int) -> tuple[int, int]:
    """(first byte, end) of the first value in the bytes_list of a Feature."""
    for field, first, last in _fields(data, start, end):
        if field == 1:
            for _, a, b in _fields(data, first, last):
                return a, b
    raise ValueError("a feature has no bytes where an image or a name belongs")


def _first_int(data: mmap.mmap, start: int, end: int) -> int:
    """The first value in the int64_list of a Feature."""
    for field, first, last in _fields(data, start, end):
        if field == 3:
            # packed or not, the list begins with its first number
            for _, a, b in _fields(data, first, last):
                if a == b:
                    continue
                value = _varint(data, a)[0]
                return value - 2**64 if value >= 2**63 else value
    raise ValueError("a feature has no number where a label belongs")
