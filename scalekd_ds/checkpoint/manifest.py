"""Files that are whole or not there: written aside, synced, renamed, and listed with size and SHA-256."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path, PurePosixPath

from scalekd_ds.durable_files import sync, write_json
from scalekd_ds.errors import UserError

MANIFEST = "manifest.json"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path) -> None:
    """Syncs every file of a folder to the disk and lists them with size and SHA-256."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    entries = {}
    for path in files:
        sync(path)
        entries[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    write_json(folder / MANIFEST, {"version": 1, "files": entries})
    for directory in {p.parent for p in files}:
        sync(directory)


def verify(checkpoint: Path, rank: int = 0, world_size: int = 1) -> None:
    """Checks every file of a checkpoint against its manifest; of several ranks each reads its share of the files.

    Raises:
        UserError: Naming the first file that is missing or damaged, and what to do.
    """
    if not checkpoint.is_dir():
        raise UserError(f"checkpoint {str(checkpoint)!r} does not exist.")
    cure = f"move {checkpoint} away to go on from the one before it"
    for number, (name, (size, sha256)) in enumerate(sorted(_entries(checkpoint / MANIFEST, cure).items())):
        path = checkpoint / name
        if not path.is_file():
            raise UserError(f"{path} is missing; {cure}.")
        if path.stat().st_size != size:
            raise UserError(f"{path} has {path.stat().st_size} bytes, {size} were written; {cure}.")
        if number % world_size == rank and _sha256(path) != sha256:
            raise UserError(f"{path} is damaged: its SHA-256 differs from the manifest's; {cure}.")


def _entries(manifest: Path, cure: str) -> dict[str, tuple[int, str]]:
    """File -> (bytes, SHA-256) of a manifest, whatever it holds."""
    try:
        files = json.loads(manifest.read_text())["files"]
        entries = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except FileNotFoundError:
        raise UserError(f"{manifest} is missing: this is no finished checkpoint; {cure}.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise UserError(f"{manifest} is damaged ({type(error).__name__}: {error}); {cure}.") from None
    for name in entries:
        # a file of the checkpoint itself, and nothing else on this machine
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name:
            raise UserError(f"{manifest} is damaged: it names {name!r}, outside of the checkpoint; {cure}.")
    return entries
