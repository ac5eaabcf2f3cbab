"""The labels in a WebDataset tar: what the .cls and the .json of a sample say."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import tarfile

from scalekd_ds.data.sources.labels import are_same, is_number
from scalekd_ds.errors import UserError

# members that may hold the label of a sample, the preferred one first
LABELS = (".cls", ".json")
# bytes of such a member at most: captions and annotations may stand beside a label
_LABEL_BYTES = 16 * 2**20
# keys of a .json that may hold the label
_KEYS = ("label", "cls", "class")


def up_to_first_dot(name: str) -> str:
    """What the members of a sample share."""
    folder, base = os.path.split(os.path.normpath(name))
    return os.path.join(folder, base.partition(".")[0])


def content_of(tar: str, fd: int, member: tarfile.TarInfo, key: str) -> bytes:
    """The bytes of a member with a label, without a mark of their order and blanks around."""
    if member.size > _LABEL_BYTES:
        raise UserError(
            f"{key}: {member.name!r} in {tar!r} has {member.size / 2**20:.0f} MiB, and is taken for a label: leave it out."
        )
    # not blanks of other kinds, which names have
    return os.pread(fd, member.size, member.offset_data).removeprefix(b"\xef\xbb\xbf").strip(b" \t\r\n")


def read_label(tar: str, fd: int, label_members: dict[str, tarfile.TarInfo], key: str) -> str | None:
    """The label of one sample, from its members by extension; None where they hold none.

    Raises:
        UserError: A member cannot be read, or two labels disagree. A name in the one and a number in the other may be the
            same class: the first counts then, .cls before .json and `label` before the other keys.
    """
    # where each is, and what it is
    found: list[tuple[str, str]] = []
    for extension in LABELS:
        if extension not in label_members:
            continue
        member = label_members[extension]
        text = content_of(tar, fd, member, key).decode("utf-8", "surrogateescape")
        if extension == ".cls" or not text:
            found += [(repr(member.name), text)] if text else []
            continue
        try:
            fields = json.loads(text)
        # JSON may be nested more deeply than its parser can follow
        except (ValueError, RecursionError):
            if found:
                # what else a .json beside a .cls holds is its own business
                continue
            raise UserError(f"{key}: {member.name!r} in {tar!r} is no JSON.") from None
        for name in _KEYS if isinstance(fields, dict) else ():
            value = fields.get(name, "")
            if isinstance(value, int | str) or (isinstance(value, float) and value.is_integer()):
                if label := str(value).strip(" \t\r\n"):
                    found.append((f"{name} in {member.name!r}", label))
            elif not found:
                raise UserError(
                    f"{key}: {member.name!r} in {tar!r} has the {name} {value!r:.60}: it must be a number or a name."
                )
    for (place, label), (other_place, other) in itertools.combinations(found, 2):
        if is_number(label) == is_number(other) and not are_same(label, other):
            raise UserError(
                f"{key}: {tar!r} has two labels for one sample, {label!r} ({place}) and {other!r} ({other_place}), which "
                "differ: leave one of them out."
            )
    return found[0][1] if found else None


def what_is_beside(image: tarfile.TarInfo, members: list[tarfile.TarInfo], fd: int) -> str:
    """A sentence about the other members of a sample without a label; empty where there are none."""
    names = []
    for member in members:
        if member is image or up_to_first_dot(member.name) != up_to_first_dot(image.name):
            continue
        text = repr(os.path.basename(member.name))
        if member.name.lower().endswith(".json"):
            with contextlib.suppress(ValueError, RecursionError):
                fields = json.loads(os.pread(fd, min(member.size, _LABEL_BYTES), member.offset_data))
                text += f" with {', '.join(map(str, fields)):.120}" if isinstance(fields, dict) and fields else ""
        names.append(text)
    return f" There is {' and '.join(names[:4])}." if names else ""
