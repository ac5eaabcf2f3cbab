"""`.deepspeed_env`: the values that DeepSpeed's launcher exports on every node, one `NAME=value` a line.

The launcher pastes each value into the command that the nodes' shells run. It quotes a value that has unusual characters
with double quotes, and escapes nothing, so values with characters that a shell interprets are refused here.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

from scalekd_ds.errors import UserError
from scalekd_ds.files.durable import sync

# prefixes of the variables that DeepSpeed's launcher exports by itself, with those of its CUDA accelerator
EXPORTED_PREFIXES = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")
_NAME = re.compile(r"[A-Z_][A-Z0-9_]*", re.ASCII)
# what a shell interprets inside double quotes, the quotes themselves, and the % of pdsh's %h, %n and %u
_REFUSED_CHARACTERS = "\"'`$\\!%"


def env_paths(folder: Path) -> list[Path]:
    """The files that the launcher reads when it is started in `folder`, in that order; a later one overrides an earlier."""
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    # an absolute $DS_ENV_FILE gives the same path twice
    # as the launcher finds it, also for a user without a home
    return list(dict.fromkeys([Path(os.path.expanduser("~")) / name, folder / name]))


def exported(folder: Path) -> dict[str, str]:
    """Name -> value of what the launcher exports on the nodes when it is started in `folder`.

    These are the environment variables with the prefixes of `EXPORTED_PREFIXES`, overridden by the files of `env_paths`.

    Raises:
        UserError: The launcher would change or break a value; the message names the first such variable.
    """
    values = {name: value for name, value in sorted(os.environ.items()) if name.startswith(EXPORTED_PREFIXES)}
    for name, value in values.items():
        check_value(name, value, f"environment variable {name}")
    for path in env_paths(folder):
        values |= read_env(path)
    return values


def check_value(name: str, value: str, where: str) -> None:
    """Refuses a variable that would not reach the nodes unchanged.

    Args:
        name: The variable's name.
        value: Its value.
        where: Start of the error message, such as the file and the line.

    Raises:
        UserError: The name is not in capitals, or the value is too long or has characters that a shell interprets.
    """
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{where}: {ascii(name)[:60]} is no name: capitals, digits and '_', as in NCCL_SOCKET_IFNAME=eth0."
        )
    if len(name) + len(value) > 4096:
        raise UserError(
            f"{where}: {name[:60]} is longer than 4096 characters, which a node's command line may not take."
        )
    bad = next((c for c in value if c in _REFUSED_CHARACTERS or not " " <= c <= "~"), None)
    if bad is not None:
        raise UserError(
            f"{where}: the value of {name} has the character {bad!a}, which the nodes' shells would read: leave it out."
        )
    if value != value.strip():
        raise UserError(f"{where}: the value of {name} starts or ends with a blank, which DeepSpeed cuts off.")


def parse_assignments(assignments: Iterable[str], where: str) -> dict[str, str]:
    """Name -> value of `NAME=value` words.

    Raises:
        UserError: One of them is not of that form, or `check_value` refuses it; the message starts with `where`.
    """
    values = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise UserError(f"{where}: {ascii(assignment)[:60]} is no NAME=value.")
        check_value(name, value, where)
        values[name] = value
    return values


def parse_env(data: bytes, source: str) -> dict[str, str]:
    """Name -> value of the content of an environment file.

    Args:
        data: The file's bytes.
        source: The file's name, for error messages.

    Raises:
        UserError: A line would make the launcher fail, or a node's shell would interpret its value; the message names
            `source` and the line.
    """
    try:
        lines = re.split(r"\r\n|\r|\n", data.decode())
    except UnicodeDecodeError:
        raise UserError(f"{source} is not text: it must hold one NAME=value a line.") from None
    if lines[-1] == "":
        lines.pop()
    values = {}
    for number, line in enumerate(lines, 1):
        where = f"{source}, line {number}"
        name, equals, value = line.partition("=")
        if not equals:
            raise UserError(
                f"{where}: {ascii(line)[:60]} is no NAME=value, and the launcher knows neither comments nor empty lines: "
                "remove it."
            )
        # the launcher strips blanks around both
        check_value(name.strip(), value.strip(), where)
        values[name.strip()] = value.strip()
    return values


def read_env(path: Path) -> dict[str, str]:
    """Name -> value of an environment file; empty if the file does not exist.

    Raises:
        UserError: The file cannot be read, or `parse_env` refuses it.
    """
    try:
        return parse_env(path.read_bytes(), str(path))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None


def write_env(path: Path, values: dict[str, str]) -> dict[str, str]:
    """Sets values in an environment file and keeps its other lines.

    The file is replaced atomically, and only its owner can read it.

    Returns:
        Name -> value of everything that the file holds afterwards.

    Raises:
        UserError: A new value or a line of the file is refused, or the file cannot be written.
    """
    for name, value in values.items():
        check_value(name, value, str(path))
    merged = read_env(path) | values
    temporary = None
    try:
        # mkstemp makes a file that only its owner can read from the start
        handle, temporary = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)
        with os.fdopen(handle, "w") as file:
            file.write("".join(f"{name}={value}\n" for name, value in merged.items()))
        sync(Path(temporary))
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {error.strerror}.") from None
    return merged
