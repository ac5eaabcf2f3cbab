"""Names that a file system takes and that lists, messages, terminals and other libraries tend to break, as bytes."""

from __future__ import annotations

import os
from pathlib import Path

ODD = [
    *(b"tab\tx", b"new\nline", b"cr\rx", b"crlf\r\nx", b"vt\x0bx", b"ff\x0cx", b"fs\x1cx", b"us\x1fx", b"del\x7f"),
    # what a terminal would take for a colour and a title
    b"esc\x1b[31mred\x1b]0;title\x07",
    # Unicode's own ends of lines, blanks and directions
    *(b"nel\xc2\x85x", b"ls\xe2\x80\xa8x", b"ps\xe2\x80\xa9x", b"nbsp\xc2\xa0x", b"rlo\xe2\x80\xaex"),
    # no UTF-8: Latin-1, a lone byte, an overlong NUL, a surrogate
    *(b"p\xeache", b"\xff", b"\xc0\x80", b"\xed\xa0\x80"),
    *(
        b" blank",
        b"blank ",
        b"  ",
        b"-dash",
        b"--data.root",
        b"#hash",
        b'"quote',
        b"'quote",
        b"!x",
        b"~",
        b"@x",
        b"a=b",
    ),
    *(b"back\\slash", b"back\\nslash", b"end\\", b"\\x41", b"a:b", b"a,b", b"a;b", b"a|b", b"&", b"*", b"?"),
    *(b"%s%n%d", b"{000..002}", b"{}", b"{0}", b"[red]a", b"[bold]", b"$x_y$", b"$(touch x)", b"`id`"),
    "😀".encode(),
    "pêche".encode(),
    # as macOS writes it: the accent by itself
    "pe\u0302che".encode(),
    *("桃".encode(), "خوخ".encode(), "👩\u200d🚀".encode()),
    *(b"L" * 255, "é".encode() * 127),
    *(b"null", b"true", b"1e3", b"[1]", b"{a: 1}", b"p..q", b"r...", b"a\tb\tc", b"x.png\tis no image", b"10", b"2"),
]
# many of these in one name of a folder, which stands above data and runs
ABOVE = b"r\n\t\xff {000..001}[x]$a$ \xe2\x80\xa8\x1b[31m'\\n p\xc3\xaache"


def path(*parts: Path | bytes | str) -> Path:
    """A path of parts, some of which are bytes."""
    return Path(os.fsdecode(os.path.join(*(os.fsencode(part) for part in parts))))


def stem(name: bytes, room: int = 10) -> bytes:
    """A name with room for more bytes before the 256th; none of its characters is cut."""
    return name if len(name) <= 255 - room else name[: 255 - room - (255 - room) % 2]
