"""WebDataset tars: the headers of a tar tell where its images are, which are then read as in any shard."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path

from scalekd_ds.data.sources.image_folder import EXTENSIONS
from scalekd_ds.data.sources.index import image_size, reason
from scalekd_ds.data.sources.shards import Sample, ShardSource, open_shards
from scalekd_ds.errors import UserError

# members that may hold the label of a sample, the preferred one first
_LABELS = (".cls", ".json")
# bytes of such a member that are read at most
_LABEL_BYTES = 64 * 1024


def is_tar(path: Path) -> bool:
    """Whether the path of a file or a pattern is that of tars."""
    return path.suffix == ".tar"


def open_tars(where: Path, key: str, classes: list[str] | None = None) -> ShardSource:
    """Opens WebDataset tars.

    A sample is the members that share a name up to its first dot: an image, and a `.cls` (a number or a name) or a
    `.json` (with label, cls or class) beside it. Where a tar has neither, the folder of an image names its class.

    Args:
        where: A folder of *.tar, one .tar, or a pattern such as `shard-{000..012}.tar`.
        key: Setting that names the source, for error messages.
        classes: Names of the classes; None takes them from a classes.txt beside the tars, or from the labels.

    Raises:
        UserError: A tar is missing, cut off or compressed; an image has no label; two images have the same name; a
            label is out of range.
    """
    return open_shards(where, key, classes, is_tar, lambda tar: _scan(tar, key))


def _scan(tar: str, key: str) -> list[Sample]:
    """All images of one tar."""
    try:
        with tarfile.open(tar, "r:") as archive:
            members = [member for member in archive if member.isreg()]
            end = archive.offset
        with open(tar, "rb") as file:
            fd = file.fileno()
            # a tar that is cut between two members shows no other sign of it
            if os.pread(fd, tarfile.BLOCKSIZE, end) != bytes(tarfile.BLOCKSIZE):
                raise UserError(f"{key}: the tar {tar!r} is cut off: it has no end marker after {len(members)} files.")
            return _samples(tar, fd, members, key)
    except tarfile.ReadError as error:
        raise UserError(f"{key}: {tar!r} is no whole, uncompressed tar: {error}.") from None
    except OSError as error:
        raise UserError(f"{key}: the tar {tar!r} cannot be read: {reason(error)}.") from None


def _samples(tar: str, fd: int, members: list[tarfile.TarInfo], key: str) -> list[Sample]:
    """Groups the members of a tar to samples; raises UserError for an image without a label."""
    label_members: dict[str, dict[str, tarfile.TarInfo]] = {}
    for member in members:
        sample, extension = _split_name(member.name)
        if extension in _LABELS:
            label_members.setdefault(sample, {})[extension] = member
    images: dict[str, tarfile.TarInfo] = {}
    for member in members:
        # without label members the whole name is the sample, which may have more dots
        sample, extension = _split_name(member.name)
        if not label_members:
            sample, extension = member.name, os.path.splitext(member.name)[1].lower()
        if extension in EXTENSIONS and images.setdefault(sample, member) is not member:
            raise UserError(
                f"{key}: {tar!r} has two images for one sample, {images[sample].name!r} and {member.name!r}."
            )
    if not images:
        raise UserError(f"{key}: the tar {tar!r} has no images ({', '.join(EXTENSIONS)}).")
    samples = []
    for sample, member in images.items():
        if label_members:
            label = _read_label(tar, fd, label_members.get(sample, {}), key)
        else:
            label = os.path.basename(os.path.dirname(os.path.normpath(member.name)))
        if not label:
            raise UserError(
                f"{key}: {member.name!r} in {tar!r} has no label: a .cls, or a .json with label, cls or class, must be "
                "beside it, or every image of the tar in a folder of its class."
            )
        size = image_size(fd, member.offset_data, member.size)
        samples.append(Sample(member.name, label, size, member.size, member.offset_data))
    return samples


def _split_name(name: str) -> tuple[str, str]:
    """The sample to which a member belongs, which is its name up to the first dot, and the rest of the name."""
    folder, base = os.path.split(name)
    stem, dot, extension = base.partition(".")
    return os.path.join(folder, stem), dot + extension.lower()


def _read_label(tar: str, fd: int, label_members: dict[str, tarfile.TarInfo], key: str) -> str | None:
    """The label of one sample, from its members by extension; None where they hold none."""
    for extension in _LABELS:
        if extension not in label_members:
            continue
        member = label_members[extension]
        try:
            text = os.pread(fd, min(member.size, _LABEL_BYTES), member.offset_data).decode()
            if extension == ".json":
                fields = json.loads(text)
                value = next((fields[name] for name in ("label", "cls", "class") if name in fields), "")
                if not isinstance(value, int | str):
                    raise TypeError
                text = str(value)
        except (ValueError, TypeError):
            raise UserError(f"{key}: {member.name!r} in {tar!r} is no {extension[1:]} of a label.") from None
        if text.strip():
            return text.strip()
    return None
