"""Locks that a process left which was ended while torch compiled one of DeepSpeed's operators: all later ones wait for them.

Only where the lock is a file that must not be there, as in torch up to 2.13. Later ones lock the file, which stays, by the
operating system, and that forgets the locks of processes that have ended.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from torch.utils import cpp_extension

from scalekd_ds.names import escape, one_line

# seconds without a change in a folder after which nobody compiles in it, on this machine or another one that shares the disk
_ABANDONED = 600.0
# seconds within which a process that has closed its lock has also removed it
_MOMENT = 1.0


def clear_build_locks() -> None:
    """Removes locks that nobody has taken for ten minutes, and names younger ones whose owner is gone; says each."""
    if not hasattr(cpp_extension, "FileBaton"):
        return
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    with suppress(OSError):
        for lock in [*root.glob("*/lock"), *root.glob("*/*/lock")]:
            # gone meanwhile, or in a folder of somebody else
            with suppress(OSError):
                if notice := _clear(lock):
                    # of each node, whose disk may be its own
                    print(one_line(notice), file=sys.stderr, flush=True)


def _clear(lock: Path) -> str | None:
    """Removes one lock if nobody has it, and returns what there is to say about it."""
    if not _is_left_over(lock):
        return None
    idle = time.time() - max(path.stat().st_mtime for path in (lock.parent, *lock.parent.iterdir()))
    if idle > _ABANDONED:
        lock.unlink()
        return f"{escape(lock)} is removed: whoever compiled {escape(lock.parent.name)} was ended {idle / 60:.0f} minutes ago"
    return (
        f"warning: {escape(lock)} is the lock of a process that no longer compiles on this machine, and DeepSpeed waits for "
        "it: remove the file, unless another machine compiles there now"
    )


def _is_left_over(lock: Path) -> bool:
    """Whether the same lock is there, and no process of this machine has it, twice within a while.

    Every process that loads an operator takes the lock for a moment, also where nothing is to be compiled, and torch closes
    the file before it removes it: whoever looks once meets locks in their last moment.
    """
    seen = lock.stat()
    for look in range(2):
        if look:
            time.sleep(_MOMENT)
        if _is_held(lock):
            return False
        now = lock.stat()
        if (now.st_ino, now.st_mtime_ns) != (seen.st_ino, seen.st_mtime_ns):
            return False
    return True


def _is_held(lock: Path) -> bool:
    """Whether a process of this machine has the lock: torch keeps it open while it compiles."""
    wanted = os.path.realpath(lock)
    for process in Path("/proc").glob("[0-9]*/fd"):
        # processes end meanwhile, and those of other users show nothing
        with suppress(OSError):
            for number in os.listdir(process):
                with suppress(OSError):
                    if os.readlink(process / number) == wanted:
                        return True
    return False
