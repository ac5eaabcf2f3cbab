"""Hosts files: one node a line, as `NAME slots=GPUS`.

They are read strictly, because DeepSpeed passes the names to shells unescaped.
"""

from __future__ import annotations

import re
from pathlib import Path

from scalekd_ds.errors import UserError

# the launcher makes a list of this length for each node; no machine has more accelerators than this
MOST_SLOTS = 1024
_LARGEST_FILE = 1 << 20
# names that pdsh and ssh take for a host and nothing else: no option, range, user or file, and nothing that a shell expands
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?", re.ASCII)
_LINE_END = re.compile(r"\r\n|\r|\n")
_SLOTS = re.compile(r"slots=([0-9]{1,9})", re.ASCII)


def read_hosts(path: str | Path) -> dict[str, int]:
    """Node -> number of ranks, in the order of a hosts file.

    This is stricter than DeepSpeed's own parser, which takes any name and ignores whatever follows the number of slots.
    DeepSpeed reads every file that is accepted here in the same way.

    Raises:
        UserError: The file cannot be read, or a line is wrong; the message has the number of the first such line.
    """
    if Path(path).is_fifo():
        # the launcher reads it again, and would wait for ever
        raise UserError(f"hosts file {str(path)!r} is a pipe: write it to a file.")
    try:
        with open(path, "rb") as file:
            data = file.read(_LARGEST_FILE + 1)
    except FileNotFoundError:
        raise UserError(f"hosts file {str(path)!r} does not exist: give the right path to --hostfile.") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"hosts file {str(path)!r} cannot be read: {reason}.") from None
    if len(data) > _LARGEST_FILE:
        raise UserError(f"hosts file {str(path)!r} is larger than 1 MiB: it must hold one `NAME slots=GPUS` a line.")
    return parse_hosts(data, str(path))


def parse_hosts(data: bytes, source: str) -> dict[str, int]:
    """Node -> number of ranks of the content of a hosts file.

    Args:
        data: The file's bytes.
        source: The file's name, for error messages.

    Raises:
        UserError: A line is wrong, or there is none; the message names `source`.
    """
    hosts: dict[str, int] = {}
    line_of: dict[str, int] = {}
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        number = len(_LINE_END.split(data[: error.start].decode()))
        raise UserError(f"hosts file {source!r}, line {number}: it is not text: write `NAME slots=GPUS`.") from None
    # DeepSpeed reads the file in Python's text mode, which ends lines in the same places
    for number, line in enumerate(_LINE_END.split(text), 1):
        where = f"hosts file {source!r}, line {number}"
        words = line.split("#", 1)[0].split()
        if not words:
            continue
        name, slots = words[0], _slots(words, where)
        check_name(name, where)
        # host names are the same in upper and lower case
        first = line_of.setdefault(name.lower(), number)
        if first != number:
            raise UserError(f"{where}: {name!r} is on line {first} already: give its slots once.")
        hosts[name] = slots
    if not hosts:
        raise UserError(f"hosts file {source!r} names no node: write one `NAME slots=GPUS` a line.")
    return hosts


def check_name(name: str, where: str) -> None:
    """Refuses a name that is not a plain host name or IPv4 address.

    Raises:
        UserError: It is not; the message starts with `where`.
    """
    if len(name) <= 253 and _NAME.fullmatch(name):
        return
    hint = "letters, digits, '.', '-' and '_' alone"
    if "@" in name:
        hint += " (the user goes into ~/.ssh/config)"
    elif ":" in name:
        hint += " (pdsh takes no IPv6 address: give it a name in /etc/hosts or ~/.ssh/config)"
    elif "[" in name:
        hint += " (ranges are not expanded: one node a line)"
    raise UserError(f"{where}: {_shown(name)} is no host name: {hint}, since the launcher passes it to a shell.")


def _slots(words: list[str], where: str) -> int:
    """The number of slots of a line that is split into words."""
    if len(words) == 1:
        raise UserError(f"{where}: {_shown(words[0])} has no slots: write `NAME slots=GPUS`.")
    if len(words) > 2:
        raise UserError(f"{where}: unknown word {_shown(words[2])}: write `NAME slots=GPUS` and nothing else.")
    match = _SLOTS.fullmatch(words[1])
    if match is None:
        raise UserError(f"{where}: unknown word {_shown(words[1])}: write `slots=GPUS`, with a whole number.")
    slots = int(match[1])
    if not 1 <= slots <= MOST_SLOTS:
        raise UserError(
            f"{where}: slots is {slots}: it must be 1 to {MOST_SLOTS}. Remove the line to leave the node out."
        )
    return slots


def _shown(text: str) -> str:
    """`text` as it is quoted in an error message: printable ASCII of at most 60 characters."""
    shown = ascii(text)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
