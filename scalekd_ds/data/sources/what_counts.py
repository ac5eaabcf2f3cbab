"""What in a data set is an image, and what other programs and systems have left there.

One rule for all sources. An image has an extension that torchvision's ImageFolder takes. Names with a dot in front and the
names below, of folders and files, are nobody's images and nobody's classes. Everything else is left out as well, and all
that is left out is counted and said.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping

from scalekd_ds.errors import say

# torchvision.datasets.folder.IMG_EXTENSIONS
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# what Synology, macOS, ext4, Windows and QNAP put into any folder
_LEFT_BY_SYSTEMS = {
    *("@eadir", "#recycle", "#snapshot", "__macosx", "lost+found", "$recycle.bin", "system volume information"),
    *("@recycle", "@recently-snapshot", "@tmp", "__pycache__", "paxheader", "paxheaders"),
    # of Macs on a network, and of older Windows
    *("network trash folder", "temporary items", "thevolumesettingsfolder", "recycler"),
}

# kinds of what is left out, as one and as several
HIDDEN_FOLDERS, HIDDEN_FILES = "hidden folder", "hidden file"
OTHER_FILES, OUTSIDE, LOOPS = (
    "file of other kinds",
    "image outside of the class folders",
    "link back to a folder above it",
)
NO_FILES, NO_SHARDS = "device or pipe named as an image", "file beside the shards"
DEAD_LINKS = "link that leads nowhere"
_PLURAL = {
    HIDDEN_FOLDERS: "hidden folders",
    HIDDEN_FILES: "hidden files",
    OTHER_FILES: "files of other kinds",
    OUTSIDE: "images outside of the class folders",
    LOOPS: "links back to folders above them",
    NO_FILES: "devices or pipes named as images",
    NO_SHARDS: "files beside the shards",
    DEAD_LINKS: "links that lead nowhere",
}


def is_left_by_systems(name: str) -> bool:
    """Whether a file or folder is hidden, or one that a system or a program keeps for itself."""
    # tar's own headers have the number of a process in the name of their folder
    return name.startswith(".") or name.lower() in _LEFT_BY_SYSTEMS or name.lower().startswith("paxheaders.")


def is_image_name(name: str) -> bool:
    """Whether a name has the extension of an image, in capitals or not."""
    return name.lower().endswith(EXTENSIONS)


def hidden_part(path: str) -> bool:
    """Whether a part of a path within a data set is hidden or a system's; `.` and `..` are no names."""
    return any(is_left_by_systems(part) for part in path.split("/") if part not in (".", ".."))


def other_kind(name: str) -> str:
    """The kind of a file that is no image, with its extension: `file of other kinds/.xml`."""
    return f"{OTHER_FILES}/{os.path.splitext(name)[1].lower()}"


def say_left_out(counts: Mapping[str, int], key: str, where: str) -> None:
    """Says in one line what a source leaves out, on rank 0; nothing where that is nothing.

    Args:
        counts: Kind -> number; `other_kind` adds an extension to its kind.
        key: Setting that names the source.
        where: The source.
    """
    kinds: Counter[str] = Counter()
    extensions: Counter[str] = Counter()
    for kind, count in counts.items():
        kind, _, extension = kind.partition("/")
        kinds[kind] += count
        if kind == OTHER_FILES:
            extensions[extension or "no extension"] += count
    parts = []
    for kind in _PLURAL:
        if kinds[kind]:
            text = f"{kinds[kind]:,} {_PLURAL[kind] if kinds[kind] > 1 else kind}"
            if kind == OTHER_FILES:
                named = [name for name, _ in extensions.most_common(4)]
                text += f" ({', '.join(named)}{', ...' if len(extensions) > len(named) else ''})"
            parts.append(text)
    say(f"{key}: left out of {where}: {', '.join(parts)}" if parts else None)


def add_up(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The sums of several counts by kind."""
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(total)
