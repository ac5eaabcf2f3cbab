"""Writes files that a crash cannot leave half written: to a temporary name first, synced to disk, then renamed.

All of it raises OSError where the disk is full, fails or refuses; the file that was there before is then there still.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` for its new content, which the end of the block gives the name `path`.

    After an error in the block the temporary file is deleted.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        sync(partial)
        partial.rename(path)
        sync(path.parent)
    except OSError as error:
        if error.filename is None:
            # that of a write names no file
            error.filename = str(partial)
        raise
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as JSON; whoever reads `path` meanwhile sees either the old file or the whole new one."""
    with written_aside(path) as partial:
        partial.write_text(json.dumps(value, indent=2) + "\n")


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a .safetensors, not aside; an error of the system is raised as OSError, which safetensors hides in a text."""
    # commands that write no tensors start without torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        if number := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
        raise
