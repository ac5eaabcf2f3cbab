"""Names of files, folders and classes, which are bytes, as text that every list, message and terminal can hold.

Here a name is a `str` of its bytes as UTF-8; a byte that is no UTF-8 is a lone surrogate, as Python has it in paths (PEP 383).
In lists and messages it is escaped as in `$'...'` of a shell, so that it can be pasted there.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from collections.abc import Iterator
from typing import Any

_LETTERS = {"\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
_BYTES = {letter[1:].encode(): character.encode() for character, letter in _LETTERS.items()}
_ESCAPED = re.compile(rb"\\(?:([\\nrt])|x([0-9a-fA-F]{2}))")


def _encoded(text: str) -> bytes:
    """The bytes of a name."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        # other lone surrogates, which no file has and a JSON may
        return text.encode("utf-8", "surrogatepass")


def text_of(path: str | os.PathLike[str]) -> str:
    """The name of a path, the same in every locale; a name stays as it is."""
    path = os.fspath(path)
    if path.isascii():
        return path
    try:
        data = os.fsencode(path)
    except UnicodeEncodeError:
        data = _encoded(path)
    return data.decode("utf-8", "surrogateescape")


def path_of(name: str) -> str:
    """The path of a name, as `os` takes it in this process's locale."""
    return name if name.isascii() else os.fsdecode(_encoded(name))


def paths_in(value: Any) -> Any:
    """Data from a JSON with `path_of` each of its texts."""
    if isinstance(value, str):
        return path_of(value)
    if isinstance(value, dict):
        return {paths_in(key): paths_in(inner) for key, inner in value.items()}
    return [paths_in(inner) for inner in value] if isinstance(value, list) else value


def is_unicode(text: str) -> bool:
    """Whether a text has a form in UTF-8: it has no lone surrogate, and so no byte of a name that is none."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _byte_by_byte(text: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in _encoded(text))


def escape(name: str | os.PathLike[str]) -> str:
    """A name in one line of printable characters, from which `unescape` makes it again.

    A backslash, newline, tab and carriage return are `\\\\`, `\\n`, `\\t` and `\\r`. What else cannot be printed, and a blank
    at either end, is `\\xHH` for each of its bytes in UTF-8.
    """
    text = text_of(name)
    if text.isprintable() and "\\" not in text and text == text.strip():
        return text
    first, last = len(text) - len(text.lstrip(" ")), len(text.rstrip(" "))
    return "".join(
        _LETTERS.get(c) or (c if c.isprintable() and first <= place < last else _byte_by_byte(c))
        for place, c in enumerate(text)
    )


def unescape(text: str) -> str:
    """The name that `escape` made `text` of; a backslash that begins nothing stays."""
    data = _ESCAPED.sub(lambda found: _BYTES.get(found[1]) or bytes.fromhex(found[2].decode()), _encoded(text))
    return data.decode("utf-8", "surrogateescape")


def one_line(text: str) -> str:
    """A message in one line that no terminal takes for a command.

    Its lines are joined, and what cannot be printed is escaped. Backslashes stay, since names in it are escaped already.
    """
    if text.isprintable():
        return text
    text = re.sub(r"[ \t]*[\r\n][ \t\r\n]*", " ", text.strip(" \t\r\n"))
    return "".join(c if c.isprintable() else _LETTERS.get(c) or _byte_by_byte(c) for c in text_of(text))


def shell_word(word: str | os.PathLike[str]) -> str:
    """A word of a command line, quoted for a shell, in one line."""
    text = text_of(word)
    return shlex.quote(text) if text.isprintable() else f"$'{escape(text).replace(chr(39), chr(92) + chr(39))}'"


@contextlib.contextmanager
def utf8_path(path: str | os.PathLike[str]) -> Iterator[str]:
    """A path of an existing file or folder while the block runs, for libraries that take none but UTF-8.

    Where the path is none, it is an alias; a folder's may be followed by names in it.
    """
    path = os.fspath(path)
    try:
        path.encode()
    except UnicodeEncodeError:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield f"/proc/{os.getpid()}/fd/{descriptor}"
        finally:
            os.close(descriptor)
    else:
        yield path
