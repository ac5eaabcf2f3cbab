"""The one exception for what a user can get wrong, and helpers that phrase it."""

from __future__ import annotations

import difflib
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable


class UserError(ValueError):
    """A mistake the user can mend. The message is one line: the thing, what it was, what to do."""

    # of the process that ends with it
    status = 2


def suggest(name: str, known: Iterable[str], count: int = 3) -> str:
    """` Did you mean 'a', 'b'?` for the known names nearest to `name`, or an empty string."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=count, cutoff=0.5)
    if not near:
        # a prefix or an infix is a typo that edit distance rates low on long names
        near = [k for k in known if name and name.lower() in k.lower()][:count]
    return f" Did you mean {', '.join(repr(n) for n in near)}?" if near else ""


def where_from() -> str:
    """` (rank 3 on NAME)` in a job of several ranks, else empty."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ""
    return f" (rank {os.environ.get('RANK', '0')} on {socket.gethostname()})"


def run_cli(main: Callable[[], int | None]) -> None:
    """Run `main`, turning a UserError into one line on stderr and its exit status, without a traceback.

    Every rank of a job meets the same mistake. Ranks other than 0 wait a moment before they print, so that the
    launcher, which ends the others as soon as one fails, normally leaves exactly one line to read. What nobody foresaw keeps
    its traceback, with a last line that says on which rank and host it was.
    """
    try:
        status = main()
    except UserError as error:
        if int(os.environ.get("RANK", "0")):
            time.sleep(1.5)
        message = " ".join(str(error).split())
        print(f"error{where_from()}: {message}", file=sys.stderr, flush=True)
        # os._exit would lose buffered output; a process group that is half set up must not hang the exit
        sys.stdout.flush()
        os._exit(error.status)
    except Exception as error:
        if not where_from():
            raise
        # in one write: other ranks print theirs into the same terminal
        text = "".join(traceback.format_exception(error))
        first = " ".join(str(error).split())
        print(f"{text}error{where_from()}: {type(error).__name__}: {first}\n", end="", file=sys.stderr, flush=True)
        sys.exit(1)
    sys.exit(status or 0)
