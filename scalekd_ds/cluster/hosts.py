"""Hosts files: `NAME slots=GPUS`, one node a line, read strictly because DeepSpeed hands the names to shells as they are."""

from __future__ import annotations

import re
from pathlib import Path

from scalekd_ds.errors import UserError

# the launcher makes a list of this length for each node; no machine has as many accelerators
MOST_SLOTS = 1024
_LARGEST_FILE = 1 << 20
# a word of `pdsh -w` and of `ssh` that is neither an option, a range, a user, a file, nor anything to a shell
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?", re.ASCII)
_LINE_END = re.compile(r"\r\n|\r|\n")
_SLOTS = re.compile(r"slots=([0-9]{1,9})", re.ASCII)


def read_hosts(path: str | Path) -> dict[str, int]:
    """The nodes of a hosts file in its order, and how many ranks each takes.

    Stricter than DeepSpeed's own parser, which passes over whatever follows the number of slots and takes any name:
    what is accepted here it reads the same.

    Raises:
        UserError: The file cannot be read, or the first line that is wrong, by its number.
    """
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
    """The nodes of a hosts file's content. Raises UserError as `read_hosts` does, naming `source`."""
    hosts: dict[str, int] = {}
    lines: dict[str, int] = {}
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        number = len(_LINE_END.split(data[: error.start].decode()))
        raise UserError(f"hosts file {source!r}, line {number}: it is not text: write `NAME slots=GPUS`.") from None
    # the line ends of Python's text files, which are those that DeepSpeed's reader knows
    for number, line in enumerate(_LINE_END.split(text), 1):
        where = f"hosts file {source!r}, line {number}"
        words = line.split("#", 1)[0].split()
        if not words:
            continue
        name, slots = words[0], _slots(words, where)
        check_name(name, where)
        # names of hosts have no case
        known = lines.setdefault(name.lower(), number)
        if known != number:
            raise UserError(f"{where}: {name!r} is on line {known} already: give its slots once.")
        hosts[name] = slots
    if not hosts:
        raise UserError(f"hosts file {source!r} names no node: write one `NAME slots=GPUS` a line.")
    return hosts


def check_name(name: str, where: str) -> None:
    """Raises a UserError that starts with `where`, unless `name` is a plain host name or IPv4 address."""
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
    """`text` for a message: printable, and no longer than a line."""
    shown = ascii(text)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
