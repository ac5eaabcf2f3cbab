"""Files that are not what they are taken for, told by their first bytes: pointers, web pages, compressed files."""

from __future__ import annotations

# how many first bytes of a file `mistaken` needs
HEAD = 512
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"7z\xbc\xaf\x27\x1c": "7-Zip",
    b"Rar!": "RAR",
}
_PAGES = (b"<!doctype", b"<html", b"<?xml", b"<head", b"<error")


def mistaken(start: bytes, wanted: str) -> str | None:
    """What a file is instead of what it should be, and what to do; None where its beginning does not tell.

    Args:
        start: The first `HEAD` bytes of the file, or all of a shorter one.
        wanted: What it should be, such as `weights`.

    Returns:
        The rest of a sentence that begins with the file's name, without its full stop.
    """
    if not start:
        return "is empty: fetch it again"
    if start.startswith(b"version https://git-lfs"):
        return f"is a git-lfs pointer, not the {wanted}: run `git lfs pull` where it came from"
    if start.lstrip().lower().startswith(_PAGES):
        return f"is a web page, not {wanted}: fetch the file itself (a `raw` or `resolve` link)"
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            return f"is compressed ({name}): unpack it"
    return None
