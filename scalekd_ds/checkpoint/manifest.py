"""The manifest of a checkpoint, a list of its files with size and SHA-256, by which damage is found."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path, PurePosixPath

from scalekd_ds.checkpoint import recovery_script
from scalekd_ds.errors import UserError
from scalekd_ds.files.durable import sync, write_json

MANIFEST = "manifest.json"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path) -> None:
    """Syncs every file of a folder to the disk, and writes the manifest that lists them.

    It leaves out the script for people who look for DeepSpeed's: a checkpoint without it is as good.
    """
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in (MANIFEST, recovery_script.NAME))
    entries = {}
    for path in files:
        sync(path)
        entries[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    write_json(folder / MANIFEST, {"version": 1, "files": entries})
    for directory in {p.parent for p in files}:
        sync(directory)


def verify(checkpoint: Path, rank: int = 0, world_size: int = 1, advice: str = "take another checkpoint") -> None:
    """Checks every file of a checkpoint against its manifest.

    Args:
        checkpoint: Folder of the checkpoint.
        rank: This rank. Each rank computes the SHA-256 of its share of the files, and checks the sizes of all.
        world_size: Number of ranks that share the work.
        advice: What to do where it is damaged, for the message.

    Raises:
        UserError: A file is missing or damaged; the message names the first one and what to do.
    """
    if not checkpoint.is_dir():
        raise UserError(f"checkpoint {str(checkpoint)!r} does not exist.")
    for number, (name, (size, sha256)) in enumerate(sorted(_read_manifest(checkpoint / MANIFEST, advice).items())):
        path = checkpoint / name
        if not path.is_file():
            raise UserError(f"{path} is missing; {advice}.")
        if path.stat().st_size != size:
            raise UserError(f"{path} has {path.stat().st_size} bytes, {size} were written; {advice}.")
        if number % world_size == rank and _sha256(path) != sha256:
            raise UserError(f"{path} is damaged: its SHA-256 differs from the manifest's; {advice}.")


def _read_manifest(manifest: Path, advice: str) -> dict[str, tuple[int, str]]:
    """File -> (bytes, SHA-256) of a manifest; raises UserError, with `advice`, where it is missing or damaged."""
    try:
        files = json.loads(manifest.read_text())["files"]
        entries = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except FileNotFoundError:
        raise UserError(f"{manifest} is missing: this is no finished checkpoint; {advice}.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise UserError(f"{manifest} is damaged ({type(error).__name__}: {error}); {advice}.") from None
    for name in entries:
        # a damaged or forged manifest must not lead to files outside of the checkpoint
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name:
            raise UserError(f"{manifest} is damaged: it names {name!r}, outside of the checkpoint; {advice}.")
    return entries
