"""`.deepspeed_env`: the values that DeepSpeed's launcher exports on every node, one `NAME=value` a line.

The launcher puts each into the command that the nodes' shells run, in double quotes where it sees a character that it
does not know and without any escapes: what a shell would read in such a value never gets into the file.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

from scalekd_ds.durable_files import sync
from scalekd_ds.errors import UserError

# DeepSpeed's own choice, and its CUDA accelerator's
EXPORTED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")
_NAME = re.compile(r"[A-Z_][A-Z0-9_]*", re.ASCII)
# what a shell reads inside of double quotes, the quotes themselves, and pdsh's %h, %n and %u
_REFUSED = "\"'`$\\!%"


def env_paths(folder: Path) -> list[Path]:
    """The files that the launcher reads when it is started in `folder`, in its order: later ones win."""
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    # an absolute name is the same file twice
    return list(dict.fromkeys([Path.home() / name, folder / name]))


def exported(folder: Path) -> dict[str, str]:
    """What the launcher exports on the nodes when it is started in `folder`: variables by their names, then the files.

    Raises:
        UserError: Naming the first that it would not hand on as it stands.
    """
    values = {name: value for name, value in sorted(os.environ.items()) if name.startswith(EXPORTED)}
    for name, value in values.items():
        check_value(name, value, f"environment variable {name}")
    for path in env_paths(folder):
        values |= read_env(path)
    return values


def check_value(name: str, value: str, where: str) -> None:
    """Refuses what DeepSpeed would not hand on as it stands.

    Raises:
        UserError: Starting with `where`, one line.
    """
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{where}: {ascii(name)[:60]} is no name: capitals, digits and '_', as in NCCL_SOCKET_IFNAME=eth0."
        )
    if len(name) + len(value) > 4096:
        raise UserError(
            f"{where}: {name[:60]} is longer than 4096 characters, which a node's command line may not take."
        )
    bad = next((c for c in value if c in _REFUSED or not " " <= c <= "~"), None)
    if bad is not None:
        raise UserError(
            f"{where}: the value of {name} has the character {bad!a}, which the nodes' shells would read: leave it out."
        )
    if value != value.strip():
        raise UserError(f"{where}: the value of {name} starts or ends with a blank, which DeepSpeed cuts off.")


def parse_assignments(assignments: Iterable[str], where: str) -> dict[str, str]:
    """Name -> value of `NAME=value` words. Raises UserError for the first that is refused."""
    values = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise UserError(f"{where}: {ascii(assignment)[:60]} is no NAME=value.")
        check_value(name, value, where)
        values[name] = value
    return values


def parse_env(data: bytes, source: str) -> dict[str, str]:
    """Name -> value of a file's content.

    Raises:
        UserError: Naming `source` and the first line that the launcher would end with a traceback on, or that a node's
            shell would read as more than a value.
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
        # the launcher strips both
        check_value(name.strip(), value.strip(), where)
        values[name.strip()] = value.strip()
    return values


def read_env(path: Path) -> dict[str, str]:
    """Name -> value of a file, nothing where there is none. Raises UserError as `parse_env` does."""
    try:
        return parse_env(path.read_bytes(), str(path))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None


def write_env(path: Path, values: dict[str, str]) -> dict[str, str]:
    """Sets values in a file for the launcher, keeping its other lines; whole or not at all, and for the owner's eyes.

    Returns:
        Everything that the file holds now.

    Raises:
        UserError: A value or a line of the file that is refused, or a file that cannot be written.
    """
    for name, value in values.items():
        check_value(name, value, str(path))
    held = read_env(path) | values
    aside = None
    try:
        # mkstemp's file is nobody else's from its first moment
        handle, aside = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)
        with os.fdopen(handle, "w") as file:
            file.write("".join(f"{name}={value}\n" for name, value in held.items()))
        sync(Path(aside))
        os.replace(aside, path)
        sync(path.parent)
    except OSError as error:
        if aside is not None:
            Path(aside).unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {error.strerror}.") from None
    return held
