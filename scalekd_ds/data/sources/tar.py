"""WebDataset tars: the headers of a tar tell where its images are, which are then read as in any shard."""

from __future__ import annotations

import json
import os
import tarfile
from collections import Counter
from pathlib import Path

from scalekd_ds.data.sources.index import image_size, reason
from scalekd_ds.data.sources.labels import is_number
from scalekd_ds.data.sources.shards import Sample, ShardSource, open_shards
from scalekd_ds.data.sources.what_counts import (
    EXTENSIONS,
    HIDDEN_FILES,
    LINKS,
    hidden_part,
    is_image_name,
    is_left_by_systems,
    other_kind,
)
from scalekd_ds.errors import UserError

# members that may hold the label of a sample, the preferred one first
_LABELS = (".cls", ".json")
# bytes of such a member that are read at most
_LABEL_BYTES = 64 * 1024


def is_tar(path: Path) -> bool:
    """Whether the path of a file or a pattern is that of tars."""
    return path.suffix == ".tar" and not is_left_by_systems(path.name)


def open_tars(where: Path, key: str, classes: list[str] | None = None) -> ShardSource:
    """Opens WebDataset tars.

    A sample is the members that share a name up to its first dot: an image, and a `.cls` (a number or a name) or a
    `.json` (with label, cls or class) beside it. Where a tar has neither, the folder of an image names its class. Hidden
    members and those of other kinds are left out, and counted.

    Args:
        where: A folder of *.tar, one .tar, or a pattern such as `shard-{000..012}.tar`.
        key: Setting that names the source, for error messages.
        classes: Names of the classes; None takes them from a classes.txt beside the tars, or from the labels.

    Raises:
        UserError: A tar is missing, cut off or compressed; an image has no label; two images have the same name; a
            label is out of range.
    """
    return open_shards(where, key, classes, is_tar, lambda tar: _scan(tar, key))


def _scan(tar: str, key: str) -> tuple[list[Sample], dict[str, int]]:
    """All images of one tar, and the number of members that are left out, by kind."""
    try:
        with tarfile.open(tar, "r:", encoding="utf-8") as archive:
            found = list(archive)
            end = archive.offset
        members = [member for member in found if member.isreg()]
        links = sum(member.islnk() or member.issym() for member in found if is_image_name(member.name))
        with open(tar, "rb") as file:
            fd = file.fileno()
            # a tar that is cut between two members shows no other sign of it
            if os.pread(fd, tarfile.BLOCKSIZE, end) != bytes(tarfile.BLOCKSIZE):
                raise UserError(f"{key}: the tar {tar!r} is cut off: it has no end marker after {len(members)} files.")
            samples, left_out = _samples(tar, fd, members, key)
            return samples, left_out | ({LINKS: links} if links else {})
    except tarfile.ReadError as error:
        raise UserError(f"{key}: {tar!r} is no whole, uncompressed tar: {error}.") from None
    except OSError as error:
        raise UserError(f"{key}: the tar {tar!r} cannot be read: {reason(error)}.") from None


def _samples(tar: str, fd: int, members: list[tarfile.TarInfo], key: str) -> tuple[list[Sample], dict[str, int]]:
    """Groups the members of a tar to samples; raises UserError for an image without a label."""
    left_out: Counter[str] = Counter()
    images, labels = [], []
    for member in members:
        extension = os.path.splitext(member.name)[1].lower()
        if hidden_part(member.name):
            left_out[HIDDEN_FILES] += 1
        elif is_image_name(member.name):
            images.append(member)
        elif extension in _LABELS:
            labels.append(member)
        else:
            left_out[other_kind(member.name)] += 1
    if not images:
        raise UserError(f"{key}: the tar {tar!r} has no images ({', '.join(EXTENSIONS)}).")
    if not labels:
        # the folder of an image names its class, and each image is a sample
        named = [(m, os.path.basename(os.path.dirname(os.path.normpath(m.name)))) for m in images]
        _check_once(images, [m.name for m in images], tar, key)
    else:
        beside = _group(images, labels, tar, key)
        named = [(m, _read_label(tar, fd, beside[m.name], key)) for m in images]
    samples = []
    for member, label in named:
        if not label:
            raise UserError(
                f"{key}: {member.name!r} in {tar!r} has no label: a .cls, or a .json with label, cls or class, must be "
                "beside it, or every image of the tar in a folder of its class."
            )
        size = image_size(fd, member.offset_data, member.size)
        samples.append(Sample(member.name, label, size, member.size, member.offset_data))
    return samples, dict(left_out)


def _group(
    images: list[tarfile.TarInfo], labels: list[tarfile.TarInfo], tar: str, key: str
) -> dict[str, dict[str, tarfile.TarInfo]]:
    """Finds the members with the label of each image: name of the image -> extension -> member.

    Members of a sample share their name up to its first dot, as WebDataset has it. Where several images do, and their names
    up to the last dot tell them and their labels apart, these are meant: `v1.2.png` and `v1.3.png` are two samples.
    """
    first_dot, last_dot = (
        ([sample_of(m.name) for m in images], [sample_of(m.name) for m in labels])
        for sample_of in (_up_to_first_dot, _up_to_last_dot)
    )
    of_images, of_labels = first_dot
    if (
        len(set(of_images)) < len(images)
        and len(set(last_dot[0])) == len(images)
        and set(last_dot[0]) == set(last_dot[1])
    ):
        of_images, of_labels = last_dot
    _check_once(images, of_images, tar, key)
    members: dict[str, dict[str, tarfile.TarInfo]] = {}
    for sample, member in zip(of_labels, labels, strict=True):
        members.setdefault(sample, {})[os.path.splitext(member.name)[1].lower()] = member
    return {image.name: members.get(sample, {}) for sample, image in zip(of_images, images, strict=True)}


def _check_once(images: list[tarfile.TarInfo], samples: list[str], tar: str, key: str) -> None:
    """Raises UserError where two images are of one sample."""
    seen: dict[str, tarfile.TarInfo] = {}
    for sample, member in zip(samples, images, strict=True):
        if seen.setdefault(sample, member) is not member:
            raise UserError(
                f"{key}: {tar!r} has two images for one sample, {seen[sample].name!r} and {member.name!r}: give each a name "
                "and a label of its own."
            )


def _up_to_first_dot(name: str) -> str:
    folder, base = os.path.split(os.path.normpath(name))
    return os.path.join(folder, base.partition(".")[0])


def _up_to_last_dot(name: str) -> str:
    return os.path.splitext(os.path.normpath(name))[0]


def _read_label(tar: str, fd: int, label_members: dict[str, tarfile.TarInfo], key: str) -> str | None:
    """The label of one sample, from its members by extension; None where they hold none.

    Raises:
        UserError: A member cannot be read, or the two disagree. A name in the one and a number in the other may be the same
            class: the .cls counts then.
    """
    found: dict[str, str] = {}
    for extension in _LABELS:
        if extension not in label_members:
            continue
        member = label_members[extension]
        try:
            text = os.pread(fd, min(member.size, _LABEL_BYTES), member.offset_data).decode("utf-8", "surrogateescape")
            if extension == ".json":
                fields = json.loads(text)
                value = next((fields[name] for name in ("label", "cls", "class") if name in fields), "")
                if not isinstance(value, int | str):
                    raise TypeError
                text = str(value)
        except (ValueError, TypeError):
            if found:
                # what else a .json beside a .cls holds is its own business
                continue
            raise UserError(f"{key}: {member.name!r} in {tar!r} is no {extension[1:]} of a label.") from None
        # not blanks of other kinds, which names have
        if label := text.strip(" \t\r\n"):
            found[extension] = label
    if len(found) == 2 and found[".cls"] != found[".json"] and is_number(found[".cls"]) == is_number(found[".json"]):
        member = label_members[".cls"]
        raise UserError(
            f"{key}: {member.name!r} in {tar!r} says {found['.cls']!r} and the .json beside it {found['.json']!r}: a sample "
            "has one label."
        )
    return next(iter(found.values()), None)
