"""`UserError`, the one exception for what a user can get wrong, and the helpers that phrase and print lines."""

from __future__ import annotations

import difflib
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable


class UserError(ValueError):
    """A mistake that the user can mend. The message is one line: the thing, what its value was, and what to do."""

    # exit status of a command that ends with this error
    status = 2


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its class where the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def suggest(name: str, known: Iterable[str], count: int = 3) -> str:
    """` Did you mean 'a', 'b'?` for the known names nearest to `name`, or an empty string."""
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
    """Prints a line on rank 0, which says for all ranks what each of them finds; None prints nothing."""
    if notice is not None and os.environ.get("RANK", "0") == "0":
        print(notice, flush=True)


def run_cli(main: Callable[[], int | None]) -> None:
    """Runs `main`, turning a UserError into one line on stderr and its exit status, without a traceback.

    Every rank of a job meets the same mistake. Ranks other than 0 wait a moment before they print, so that the
    launcher, which ends the others as soon as one fails, normally leaves exactly one line to read. Any other exception
    keeps its traceback; in a job of several ranks a last line says on which rank and host it was raised.
    """
    try:
        status = main()
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(1.5)
        message = " ".join(str(error).split())
        print(f"error{rank_and_host()}: {message}", file=sys.stderr, flush=True)
        # os._exit, because a process group that is half set up could hang a normal exit; it does not flush by itself
        sys.stdout.flush()
        os._exit(error.status)
    except Exception as error:
        if not rank_and_host():
            raise
        # one write for all of it, because other ranks print theirs into the same terminal
        text = "".join(traceback.format_exception(error))
        message = " ".join(str(error).split())
        print(f"{text}error{rank_and_host()}: {type(error).__name__}: {message}\n", end="", file=sys.stderr, flush=True)
        sys.exit(1)
    sys.exit(status or 0)
