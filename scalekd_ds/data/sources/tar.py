"""WebDataset tars: the headers of a tar tell where its images are, which are then read as in any shard."""

from __future__ import annotations

import copy
import os
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from scalekd_ds.data.sources.index import reason
from scalekd_ds.data.sources.shards import Sample, ShardSource, open_shards
from scalekd_ds.data.sources.tar_labels import LABELS, content_of, read_label, up_to_first_dot, what_is_beside
from scalekd_ds.data.sources.what_counts import (
    DEAD_LINKS,
    EXTENSIONS,
    HIDDEN_FILES,
    NO_FILES,
    hidden_part,
    is_image_name,
    is_left_by_systems,
    other_kind,
)
from scalekd_ds.errors import UserError
from scalekd_ds.files.mistaken import HEAD, mistaken

# bytes behind the end of a tar that are looked at: writers fill up to blocks of 10 KiB, some to more
_BEHIND = 2**20
# links from one member to the next that are followed at most
_MAX_LINKS = 8


def is_tar(path: Path) -> bool:
    """Whether the path of a file or a pattern is that of tars."""
    return path.suffix.lower() == ".tar" and not is_left_by_systems(path.name) and not path.is_dir()


def open_tars(where: Path, key: str, classes: list[str] | None = None) -> ShardSource:
    """Opens WebDataset tars.

    A sample is the members that share a name up to its first dot: an image, and a `.cls` (a number or a name) or a
    `.json` (with label, cls or class) beside it. Where no member of a tar has a label, the folder of an image names its
    class. Hidden members and those of other kinds are left out, and counted.

    Args:
        where: A folder of *.tar, one .tar, or a pattern such as `shard-{000..012}.tar`.
        key: Setting that names the source, for error messages.
        classes: Names of the classes; None takes them from a classes.txt beside the tars, or from the labels.

    Raises:
        UserError: A tar is missing, cut off or compressed; an image has no label; two images have the same name; a
            label is out of range.
    """
    # whether labels are beside the images -> a tar of which it is so
    ways: dict[bool, str] = {}

    def scan(tar: str) -> tuple[list[Sample], dict[str, int]]:
        samples, left_out, labelled = _scan(tar, key)
        ways.setdefault(labelled, tar)
        if len(ways) == 2:
            raise UserError(
                f"{key}: {ways[True]!r} has a .cls or .json beside its images, and {ways[False]!r} none, where folders would "
                "name the classes: all tars must be labelled in the same way."
            )
        return samples, left_out

    return open_shards(where, key, classes, is_tar, scan, lambda: False in ways)


def _scan(tar: str, key: str) -> tuple[list[Sample], dict[str, int], bool]:
    """All images of one tar, the number of members that are left out, by kind, and whether labels are beside the images."""
    try:
        with tarfile.open(tar, "r:", encoding="utf-8") as archive:
            members = list(archive)
            end = archive.offset
        with open(tar, "rb") as file:
            fd = file.fileno()
            # a tar that is cut between two members shows no other sign of it
            if os.pread(fd, tarfile.BLOCKSIZE, end) != bytes(tarfile.BLOCKSIZE):
                raise UserError(f"{key}: the tar {tar!r} is cut off: it has no end marker after {len(members)} files.")
            if os.pread(fd, _BEHIND, end).strip(b"\0"):
                raise UserError(
                    f"{key}: the tar {tar!r} has more behind its end, after {len(members)} files, as tars that were joined "
                    "byte by byte: give each as a shard of its own, or join them with tar --concatenate."
                )
            left_out: Counter[str] = Counter()
            files = _files(tar, members, left_out, key)
            samples, labelled = _samples(tar, fd, files, left_out, key)
            return samples, dict(left_out), labelled
    except tarfile.ReadError as error:
        with open(tar, "rb") as file:
            other = mistaken(file.read(HEAD), "images")
        raise UserError(f"{key}: {tar!r} {other or f'is no whole, uncompressed tar: {error}'}.") from None
    except OSError as error:
        raise UserError(f"{key}: the tar {tar!r} cannot be read: {reason(error)}.") from None


def _files(tar: str, members: list[tarfile.TarInfo], left_out: Counter[str], key: str) -> list[tarfile.TarInfo]:
    """The members that are files. A link to another member, as tar writes for a second name of a file, has its bytes."""
    by_name = {os.path.normpath(member.name): member for member in members if not member.isdir()}
    files = []
    for member in members:
        target: tarfile.TarInfo | None = member
        for _ in range(_MAX_LINKS):
            if target is None or not (target.islnk() or target.issym()):
                break
            # a hard link has the name of a member, and a symbolic one starts at its own folder
            folder = os.path.dirname(target.name) if target.issym() else ""
            target = by_name.get(os.path.normpath(os.path.join(folder, target.linkname)))
        if member.isdir():
            continue
        if hidden_part(member.name):
            left_out[HIDDEN_FILES] += 1
        elif target is None or target.islnk() or target.issym():
            left_out[DEAD_LINKS] += 1
        elif not target.isreg():
            left_out[NO_FILES] += is_image_name(member.name)
        elif target.issparse() and is_image_name(member.name):
            raise UserError(f"{key}: {member.name!r} in {tar!r} is stored with holes: write the tar without --sparse.")
        else:
            files.append(target if target is member else copy.copy(target))
            files[-1].name = member.name
    return files


def _samples(
    tar: str, fd: int, members: list[tarfile.TarInfo], left_out: Counter[str], key: str
) -> tuple[list[Sample], bool]:
    """Groups the files of a tar to samples, and says whether labels are beside them; UserError for one without a label."""
    images, labels = [], []
    for member in members:
        extension = os.path.splitext(member.name)[1].lower()
        if is_image_name(member.name):
            images.append(member)
        elif extension in LABELS:
            labels.append(member)
        else:
            left_out[other_kind(member.name)] += 1
    if not images:
        inside = sum(member.name.lower().endswith((".tar", ".tar.gz", ".zip")) for member in members)
        if inside:
            raise UserError(f"{key}: the tar {tar!r} has no images, but {inside} archives: unpack it.")
        raise UserError(f"{key}: the tar {tar!r} has no images ({', '.join(EXTENSIONS)}): leave it out.")
    beside = _group(images, labels, tar, fd, key) if labels else {}
    found: Sequence[str | None] = [read_label(tar, fd, beside[m.name], key) if labels else None for m in images]
    labelled = any(label is not None for label in found)
    if not labelled:
        # the folder of an image names its class, and each image is a sample; what a .json holds is something else
        left_out.update(other_kind(member.name) for member in labels)
        found = _names_of_folders(images, tar, key)
    samples = []
    for member, label in zip(images, found, strict=True):
        if not label:
            raise UserError(
                f"{key}: {member.name!r} in {tar!r} has no label: a .cls, or a .json with label, cls or class, must be "
                "beside it, or every image of the tar in a folder of its class."
                f"{what_is_beside(member, members, fd)}"
            )
        samples.append(Sample(member.name, label, member.size, member.offset_data))
    return samples, labelled


def _names_of_folders(images: list[tarfile.TarInfo], tar: str, key: str) -> list[str]:
    """The name of the folder of each image; UserError where a folder of images is in another one."""
    _check_once(images, [os.path.normpath(m.name) for m in images], tar, key)
    folders = [os.path.dirname(os.path.normpath(m.name)) for m in images]
    distinct = set(folders)
    of_class: dict[str, str] = {}
    for folder in sorted(distinct):
        other = of_class.setdefault(os.path.basename(folder), folder)
        if other != folder:
            raise UserError(
                f"{key}: {tar!r} has images of the class {os.path.basename(folder)!r} in {other!r} and in {folder!r}: give "
                "each class one folder, and training and validation images tars of their own, or put a .cls beside each image."
            )
    for folder in sorted(distinct):
        above = folder
        while above := os.path.dirname(above).rstrip("/"):
            if above in distinct:
                raise UserError(
                    f"{key}: {tar!r} has images in the folder {above!r} and in {folder!r}, and the folder of an image names "
                    "its class: give each class one folder, or a .cls beside each image."
                )
    return [os.path.basename(folder) for folder in folders]


def _group(
    images: list[tarfile.TarInfo], labels: list[tarfile.TarInfo], tar: str, fd: int, key: str
) -> dict[str, dict[str, tarfile.TarInfo]]:
    """Finds the members with the label of each image: name of the image -> extension -> member.

    Members of a sample share their name up to its first dot, as WebDataset has it. Where several images do, and their names
    up to the last dot tell them and their labels apart, these are meant: `v1.2.png` and `v1.3.png` are two samples.
    """
    first_dot, last_dot = (
        ([sample_of(m.name) for m in images], [sample_of(m.name) for m in labels])
        for sample_of in (up_to_first_dot, _up_to_last_dot)
    )
    of_images, of_labels = first_dot
    if (
        len(set(of_images)) < len(images)
        and len(set(last_dot[0])) == len(images)
        and set(last_dot[0]) <= set(last_dot[1])
    ):
        of_images, of_labels = last_dot
    _check_once(images, of_images, tar, key)
    members: dict[str, dict[str, tarfile.TarInfo]] = {}
    for sample, member in zip(of_labels, labels, strict=True):
        beside = members.setdefault(sample, {})
        extension = os.path.splitext(member.name)[1].lower()
        other = beside.setdefault(extension, member)
        if other is member or content_of(tar, fd, other, key) == content_of(tar, fd, member, key):
            continue
        dots = [os.path.basename(each.name).count(".") for each in (other, member)]
        if extension == ".cls" or dots[0] == dots[1]:
            raise UserError(
                f"{key}: {tar!r} has two labels for one sample, {other.name!r} and {member.name!r}, which differ: leave one "
                "of them out."
            )
        # 0.json is about the sample, and 0.meta.json about something of it
        beside[extension] = min(other, member, key=lambda each: os.path.basename(each.name).count("."))
    return {image.name: members.get(sample, {}) for sample, image in zip(of_images, images, strict=True)}


def _check_once(images: list[tarfile.TarInfo], samples: list[str], tar: str, key: str) -> None:
    """Raises UserError where two images are of one sample."""
    seen: dict[str, tarfile.TarInfo] = {}
    for sample, member in zip(samples, images, strict=True):
        if seen.setdefault(sample, member) is not member:
            raise UserError(
                f"{key}: {tar!r} has two images for one sample, {seen[sample].name!r} and {member.name!r}: give each a name "
                "and a label of its own, or leave out what is no picture of the class, such as a mask."
            )


def _up_to_last_dot(name: str) -> str:
    return os.path.splitext(os.path.normpath(name))[0]
