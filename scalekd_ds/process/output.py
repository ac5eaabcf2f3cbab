"""Standard output and error that never fail: whoever reads them may go away, and the work goes on."""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from contextlib import suppress
from typing import Any, TextIO

_NAMES = {1: "standard output", 2: "standard error"}


class _Output:
    """Of this process."""

    # descriptor -> the first error
    lost: dict[int, OSError] = {}  # noqa: RUF012
    # what goes on without a reader, which is said once
    work: str | None = None


_output = _Output()


class _Lossy(io.FileIO):
    """A file descriptor whose writes succeed, whatever becomes of them."""

    def __init__(self, descriptor: int, shown: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._shown = shown

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        while rest:
            try:
                written = super().write(rest)
            except OSError as error:
                _note(self._shown, error)
                break
            if written is None:
                # a terminal may be left non-blocking by another program on it
                with suppress(OSError, ValueError):
                    select.select([], [self.fileno()], [])
                continue
            rest = rest[written:]
        return size


def _note(descriptor: int, error: OSError) -> None:
    if descriptor in _output.lost:
        return
    _output.lost[descriptor] = error
    if _output.work is not None:
        other = 3 - descriptor
        line = f"warning: {_NAMES[descriptor]} cannot be written ({reason(error)}): {_output.work} goes on\n"
        with suppress(OSError):
            os.write(other, line.encode())


def reason(error: OSError) -> str:
    """The text of an error of the system, without its number."""
    return error.strerror or type(error).__name__


def lossy(descriptor: int, encoding: str, like: Any = None, shown: int | None = None) -> TextIO:
    """A text file on a descriptor whose writes never fail, and which shows as `\\u2713` what `encoding` does not have.

    Args:
        descriptor: The descriptor, which stays open where the file is closed.
        encoding: The encoding.
        like: A text file whose buffering is taken over; None buffers lines.
        shown: The descriptor that messages name; None for the same.
    """
    raw = _Lossy(descriptor, descriptor if shown is None else shown)
    through = bool(like is not None and like.write_through)
    buffered = bool(like.line_buffering) if like is not None else True
    return io.TextIOWrapper(
        # `python -u`: nothing may wait in a buffer
        raw if through else io.BufferedWriter(raw),
        encoding,
        "backslashreplace",
        line_buffering=buffered,
        write_through=through,
    )


def guard() -> None:
    """Makes this process's standard output and error such files, and opens the standard files that are closed."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # the next file that is opened would take its number, and what libraries print would go into that file
            os.open(os.devnull, os.O_RDWR)
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        stream, original = getattr(sys, name), getattr(sys, f"__{name}__")
        # what tests or notebooks put in its place stays there
        if stream is not original or isinstance(getattr(getattr(stream, "buffer", None), "raw", None), _Lossy):
            continue
        if stream is not None:
            with suppress(OSError):
                stream.flush()
        guarded = lossy(descriptor, stream.encoding if stream is not None else "utf-8", stream)
        setattr(sys, name, guarded)


def goes_on(work: str) -> None:
    """Says on the other stream, once, that `work` goes on where standard output or error cannot be written."""
    _output.work = work


def failure() -> OSError | None:
    """Why standard output could not be written; None where it could, or where its reader only had read enough."""
    with suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
    error = _output.lost.get(1)
    return None if error is None or error.errno == errno.EPIPE or _output.work is not None else error
