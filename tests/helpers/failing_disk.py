"""A disk on which one call fails: `open` to write, `mkdir`, `rename`, `fsync`, `write`, or safetensors' own writer."""

from __future__ import annotations

import builtins
import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import safetensors.torch
from safetensors import SafetensorError

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class _File:
    """An open file whose writes are counted."""

    def __init__(self, file: Any, path: str, disk: FailingDisk) -> None:
        self._file, self._path, self._disk = file, path, disk

    def write(self, data: Any) -> int:
        self._disk.count("write", self._path)
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        self._file.__enter__()
        return self

    def __exit__(self, *error: object) -> Any:
        return self._file.__exit__(*error)

    def __iter__(self) -> Iterator:
        return iter(self._file)


class FailingDisk:
    """Counts the calls that write below a folder, and lets one of them, or all from one on, fail.

    Args:
        root: The folder; what happens elsewhere is not counted.
        at: Number of the call that fails, from 0; None lets none fail.
        number: The error, such as `errno.ENOSPC`.
        lasting: All later calls fail, too.

    Attributes:
        calls: (kind, path below the folder) of each call.
    """

    def __init__(self, root: Path, at: int | None = None, number: int = 0, lasting: bool = False) -> None:
        self.root, self.at, self.number, self.lasting = os.path.abspath(root), at, number, lasting
        self.calls: list[tuple[str, str]] = []

    def count(self, kind: str, path: Any) -> None:
        """Counts a call, and raises OSError where it is one that fails."""
        if isinstance(path, int):
            try:
                path = os.readlink(f"/proc/self/fd/{path}")
            except OSError:
                return
        path = os.path.abspath(os.fsdecode(path))
        if path != self.root and not path.startswith(self.root + os.sep):
            return
        place = len(self.calls)
        self.calls.append((kind, os.path.relpath(path, self.root)))
        if self.at is not None and (place == self.at or (self.lasting and place > self.at)):
            raise OSError(self.number, os.strerror(self.number), path)

    @contextlib.contextmanager
    def __call__(self) -> Iterator[FailingDisk]:
        """A context in which the calls of this process are counted."""
        real_open, real_os_open, real_save = io.open, os.open, safetensors.torch.serialize_file

        def opened(file, mode="r", *args, **kwargs):
            if not set(mode) & set("wax+"):
                return real_open(file, mode, *args, **kwargs)
            self.count("open", file)
            found = real_open(file, mode, *args, **kwargs)
            path = os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else os.path.abspath(os.fsdecode(file))
            return _File(found, path, self) if path.startswith(self.root) else found

        def os_opened(path, flags, *args, **kwargs):
            if flags & _WRITING:
                self.count("open", path)
            return real_os_open(path, flags, *args, **kwargs)

        def save(tensors, path, *args, **kwargs):
            try:
                self.count("save", path)
            except OSError as error:
                # as Rust's library says it
                raise SafetensorError(f"I/O error: {error.strerror} (os error {error.errno})") from None
            return real_save(tensors, path, *args, **kwargs)

        def wrapped(kind, function):
            def call(path, *args, **kwargs):
                self.count(kind, path)
                return function(path, *args, **kwargs)

            return call

        with contextlib.ExitStack() as stack:
            for module in (builtins, io):
                stack.enter_context(patch.object(module, "open", opened))
            stack.enter_context(patch.object(os, "open", os_opened))
            stack.enter_context(patch.object(safetensors.torch, "serialize_file", save))
            for kind in ("mkdir", "rename", "replace", "fsync"):
                stack.enter_context(patch.object(os, kind, wrapped(kind, getattr(os, kind))))
            yield self
