"""`UserError`, the one exception for what a user can get wrong, and the helpers that phrase and print lines."""

from __future__ import annotations

import difflib
import errno
import os
import re
import resource
import shutil
import socket
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

from scalekd_ds.names import one_line
from scalekd_ds.process import output, signals

_OWN_CODE = str(Path(__file__).parent)
# colours and the like
_TERMINAL_CODES = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07]*\x07|.)")
_LONGEST_CAUSE = 300
# what a user can do about an error of the system
_CURES = {
    errno.ENOSPC: "free space on the disk, or inodes (`df -i`)",
    errno.EDQUOT: "the quota of its disk is used up: delete files, or ask for more",
    errno.EFBIG: "files may not grow so large here: raise `ulimit -f`, or use another disk",
    errno.EROFS: "its disk may only be read: name another folder",
    errno.EACCES: "check its permissions",
    errno.EPERM: "check its permissions",
    errno.EIO: "its disk or network fails: look at `dmesg`",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of the path is a file: check the path",
    errno.EISDIR: "it is a folder: name a file",
    errno.EEXIST: "it is there already: name another",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "its links lead in a circle: check the path",
    errno.EMFILE: "raise `ulimit -n`",
    errno.ENFILE: "the machine has too many open files",
    errno.ENOMEM: "free memory, or use a machine with more",
    errno.ESTALE: "its network disk is gone: mount it again",
}
_NO_MEMORY = ("can't allocate memory", "Cannot allocate memory", "out of memory", "std::bad_alloc")
# other processes and connections, whose loss is no mistake of the user's
_NO_FILE = (ConnectionError, TimeoutError, ChildProcessError, ProcessLookupError, InterruptedError, BlockingIOError)


class UserError(ValueError):
    """A mistake that the user can mend. The message is one line: the thing, what its value was, and what to do."""

    # exit status of a command that ends with this error
    status = 2


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its class where the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def cause_of(error: BaseException) -> str:
    """The cause of an error of another library in one line: the deepest one that it names, without colours or advice.

    A converter or a loader wraps the error that says something in several that only say that it failed.
    """
    found = [error]
    while (deeper := found[-1].__cause__) is not None and deeper not in found:
        found.append(deeper)
    for cause in reversed(found):
        lines = [" ".join(_TERMINAL_CODES.sub("", line).split()) for line in str(cause).splitlines()]
        # "Critical error in pipeline:" says nothing yet
        lines = [line for line in lines if not line.endswith((":", ","))] or lines
        if isinstance(cause, OSError) and cause.errno is not None and cause.errno > 0:
            lines = [problem_of(cause)]
        if text := next(filter(None, lines), ""):
            # the text of a KeyError is the key alone
            text = f"{type(cause).__name__}: {text}" if isinstance(cause, LookupError) else text
            return text[:_LONGEST_CAUSE].rstrip(" .")
    return type(found[-1]).__name__


def problem_of(error: OSError) -> str:
    """What is wrong with which file, in one line."""
    name = error.filename if error.filename is not None else error.filename2
    text = error.strerror or " ".join(str(error).split()) or type(error).__name__
    return f"{text}: {os.fsdecode(name) if isinstance(name, bytes) else name}" if name is not None else text


def cure_of(problem: str) -> str:
    """What to do about a text of `problem_of`, or of a library that quotes the system, without a full stop."""
    found = (cure for number, cure in _CURES.items() if os.strerror(number) in problem)
    return next(found, "check the path and its disk")


def explained(main: Callable[[], int | None]) -> int | None:
    """Runs `main`, and turns what the world outside of this package does to it into UserErrors.

    An error of the system that concerns a file is always one. Another exception is one where code of another library raised
    it: its whole traceback is then in a file that the line names. What our own code raises is a mistake of ours, and stays
    as it is; so does whatever ends a job of several ranks, which can be started again.

    Raises:
        UserError: As above.
    """
    try:
        _check_folder()
        return main()
    except UserError:
        raise
    except OSError as error:
        if isinstance(error, _NO_FILE) or error.errno is None or error.errno < 0:
            raise
        raise UserError(f"{problem_of(error)}: {_CURES.get(error.errno, cure_of(''))}.") from error
    except Exception as error:
        if _is_out_of_memory(error):
            limit, _ = resource.getrlimit(resource.RLIMIT_AS)
            if limit != resource.RLIM_INFINITY:
                raise UserError(
                    f"out of memory ({cause_of(error)}): `ulimit -v` allows {limit / 2**30:.1f} GiB of addresses, of which "
                    "libraries take several times what they use: raise it, or set it to unlimited."
                ) from error
            raise UserError(
                f"out of memory ({cause_of(error)}): use smaller batches (--micro_batch_size) or images, a higher ZeRO "
                "stage, or --run.teacher_placement sharded; `scalekd plan` says what fits."
            ) from error
        frames = traceback.extract_tb(error.__traceback__)
        if rank_and_host() or not frames or frames[-1].filename.startswith((_OWN_CODE, "<")):
            raise
        where = _kept_traceback(error)
        told = f"; the whole traceback is in {where}" if where else ""
        raise UserError(f"{_library_of(frames[-1].filename)} fails: {cause_of(error)}{told}.") from error


def _check_folder() -> None:
    """Raises UserError where the current folder has been deleted, in which MKL ends the process with another reason."""
    try:
        os.getcwd()
    except OSError as error:
        raise UserError(
            f"the current folder cannot be used ({error.strerror}), since it was deleted or unmounted: cd to another."
        ) from None


def _is_out_of_memory(error: Exception) -> bool:
    """Whether a device's or the machine's memory was too small, which each library says in its own way."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY))
    )


def _library_of(file: str) -> str:
    """The name of the package that a file of Python belongs to."""
    parts = Path(file).parts
    place = max((i for i, part in enumerate(parts) if part in ("site-packages", "dist-packages")), default=None)
    return parts[place + 1].removesuffix(".py") if place is not None and place + 1 < len(parts) else Path(file).stem


def _kept_traceback(error: BaseException) -> str | None:
    """Writes a traceback into a file, and returns its path; None where no folder takes it."""
    try:
        handle, path = tempfile.mkstemp(prefix="scalekd-", suffix=".traceback.txt")
        with os.fdopen(handle, "w") as file:
            file.write("".join(traceback.format_exception(error)))
    except OSError:
        return None
    return path


def suggest(name: str, known: Iterable[str], count: int = 3) -> str:
    """` Did you mean 'a', 'b'?` for the known names nearest to `name`, or an empty string.

    Args:
        name: What the user wrote.
        known: All names that there are.
        count: Most names to give.
    """
    known = list(known)
    matches = difflib.get_close_matches(name, known, n=count, cutoff=0.5)
    if not matches:
        # part of a long name is far from it by edit distance, and yet most likely meant
        matches = [k for k in known if name and name.lower() in k.lower()][:count]
    return f" Did you mean {', '.join(repr(n) for n in matches)}?" if matches else ""


def rank_and_host() -> str:
    """` (rank 3 on HOSTNAME)` in a job of several ranks, and an empty string in any other process."""
    if "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        return ""
    return f" (rank {os.environ.get('RANK', '0')} on {socket.gethostname()})"


def say(notice: str | None) -> None:
    """Prints a line on rank 0, which says for all ranks what each of them finds; None prints nothing.

    On a terminal it is broken between words.
    """
    if notice is not None and os.environ.get("RANK", "0") == "0":
        line = one_line(notice)
        if sys.stdout.isatty():
            # a terminal would break it within words; a log has whole lines, for grep
            columns = shutil.get_terminal_size().columns
            line = textwrap.fill(line, columns, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
        print(line, flush=True)


def run_cli(main: Callable[[], int | None]) -> None:
    """Runs `main`, turning a UserError into one line on stderr and its exit status, without a traceback.

    Every rank of a job meets the same mistake. Ranks other than 0 wait a moment before they print, so that the
    launcher, which ends the others as soon as one fails, normally leaves exactly one line to read. What
    `explained` leaves keeps its traceback; in a job of several ranks a last line says on which rank and host it was raised.
    A signal ends `main` with one line and status 128 + its number, and output that nobody can read any more is no error.
    """
    output.guard()
    signals.install()
    try:
        status = explained(main)
        signals.finished()
    except UserError as error:
        _end_if_interrupted()
        signals.end_quietly(error.status)
        if os.environ.get("RANK", "0") != "0":
            time.sleep(1.5)
        print(f"error{rank_and_host()}: {one_line(str(error))}", file=sys.stderr, flush=True)
        # os._exit, because a process group that is half set up could hang a normal exit; it does not flush by itself
        sys.stdout.flush()
        os._exit(error.status)
    except signals.Interrupted as error:
        signals.end(error.number)
    except Exception as error:
        _end_if_interrupted()
        if not rank_and_host():
            raise
        # one write for all of it, because other ranks print theirs into the same terminal
        text = "".join(traceback.format_exception(error))
        message = one_line(str(error))
        print(f"{text}error{rank_and_host()}: {type(error).__name__}: {message}\n", end="", file=sys.stderr, flush=True)
        # NCCL's threads would wait at a normal exit for collectives in which this rank's peers wait for it
        sys.stdout.flush()
        os._exit(1)
    if failure := output.failure():
        print(f"error: standard output cannot be written: {output.reason(failure)}.", file=sys.stderr, flush=True)
        status = status or UserError.status
    sys.exit(status or 0)


def _end_if_interrupted() -> None:
    """Ends as a signal asked where the interruption was turned into another error on its way up."""
    if (number := signals.interrupted()) is not None:
        signals.end(number)
