"""One job at a time in a folder, also where several machines share the folder.

The lock is a file with the name of its owner. The kernel's lock on it (flock) ends with the owner, however that ends, and
tells processes of one machine apart. File systems that several machines share may keep such locks for each machine alone,
so the owner also counts up in the file every few seconds: a count that stands still is that of a machine that died.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import pwd
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scalekd_ds.errors import UserError

NAME = ".lock"
# seconds between two counts of the owner
BEAT = 5.0
# seconds without a count after which the owner on another machine is taken for dead
STALE = 30.0
# seconds to wait for an owner on this machine, which may be about to end
GRACE = 10.0
# a little longer, after which the next try has taken over what a dead machine left
MARGIN = 2.0
# the file has one length, so that a full disk has room for the next count
_LENGTH = 512
_NOT_SUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)


def _boot() -> str:
    """What tells this boot of this machine from all others."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


def _numbering() -> str:
    """What tells the numbers of this process's neighbours from those of another container on the same machine."""
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _is_neighbour(owner: dict[str, Any]) -> bool:
    """Whether an owner runs where its process can be seen from here."""
    return owner.get("boot", _boot()) == _boot() and owner.get("numbering", _numbering()) == _numbering()


def _start_of(pid: Any) -> str | None:
    """When a process of this machine started, in the kernel's ticks; None where there is none."""
    try:
        # the name before the last parenthesis may hold anything
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


class FolderLock:
    """Holds a folder for this process from `acquire` to `release`.

    Args:
        folder: The folder, which exists.
        key: The setting that names it, for messages.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.path, self.key = folder / NAME, key
        self._file: int | None = None
        self._count = 0
        self._since = time.strftime("%Y-%m-%d %H:%M:%S")
        self._self = {"host": socket.gethostname(), "pid": os.getpid(), "start": _start_of(os.getpid())}
        self._self |= {"boot": _boot(), "numbering": _numbering()}
        self._released = threading.Event()
        self._counting: threading.Thread | None = None
        # the last count of an owner on another machine, and when it was first seen
        self._seen: tuple[Any, float] | None = None

    def acquire(self) -> None:
        """Takes the lock, after a wait where its owner may be about to end or on a machine that died.

        Raises:
            UserError: Another process holds the folder, or the lock cannot be written.
        """
        first: dict[str, Any] = {}
        waiting_since = time.monotonic()
        while True:
            try:
                owner = self._try()
            except OSError as error:
                raise UserError(
                    f"{self.key} is {str(self.path.parent)!r}, which cannot be locked ({error.strerror}): {self._cure(error)}."
                ) from None
            if owner is None:
                break
            here = _is_neighbour(owner)
            limit = GRACE if here else STALE
            who = "another process"
            if owner:
                who = f"process {owner.get('pid')} on {owner.get('host')} since {owner.get('since')}"
            if owner and not first:
                first = owner
                self._say(f"is in use by {who}: waiting {limit:.0f} s for it to end")
            moved = not here and owner.get("count") != first.get("count")
            if time.monotonic() - waiting_since > limit + MARGIN or moved:
                raise UserError(
                    f"{self.key} is {str(self.path.parent)!r}, in which {who} trains: wait for it to end, stop it, or choose "
                    f"another {self.key}."
                )
            time.sleep(0.2)
        self._counting = threading.Thread(target=self._beat, name="folder-lock", daemon=True)
        self._counting.start()

    def _try(self) -> dict[str, Any] | None:
        """Takes the lock and returns None, or returns what its owner wrote."""
        file, is_taken = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), False
        locked: bool | None
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                locked = True
            except OSError as error:
                if error.errno in _NOT_SUPPORTED:
                    locked = None
                elif error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    return _read(file) or {}
                else:
                    raise
            # an owner that ended meanwhile has removed the file that was opened, and another may have made a new one
            if not _is_file_at(file, self.path):
                return {}
            owner = _read(file)
            if owner and not self._is_dead(owner, locked):
                return owner
            self._write(file)
            self._file, is_taken = file, True
            return None
        finally:
            if not is_taken:
                os.close(file)

    def _cure(self, error: OSError) -> str:
        """What to do about an error of `_try`."""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return "free its disk"
        try:
            found = os.lstat(self.path)
        except OSError:
            return "it must be a folder that this user may write to"
        if not stat.S_ISREG(found.st_mode):
            return f"{str(self.path)!r} is no file: remove it"
        if found.st_uid != os.geteuid() and os.access(self.path.parent, os.W_OK):
            return (
                f"{str(self.path)!r} is of {_user(found.st_uid)}, who trains in it or did: remove it once no job does"
            )
        return "it must be a folder that this user may write to"

    def _is_dead(self, owner: dict[str, Any], locked: bool | None) -> bool:
        """Whether the owner that wrote the file is known to have ended; `locked`: flock gave it, None without flock."""
        if owner.get("boot") == _boot() and locked:
            return True
        if "boot" in owner and _is_neighbour(owner):
            return _start_of(owner.get("pid")) != owner.get("start")
        if self._seen is None or self._seen[0] != owner.get("count"):
            self._seen = owner.get("count"), time.monotonic()
        dead = time.monotonic() - self._seen[1] > STALE
        if dead:
            self._say(
                f"was left by process {owner.get('pid')} on {owner.get('host')}, of which there is no sign of life for "
                f"{STALE:.0f} s: it is taken over"
            )
        return dead

    def _say(self, text: str) -> None:
        print(f"{self.key} {str(self.path.parent)!r} {text}", file=sys.stderr, flush=True)

    def _write(self, file: int) -> None:
        """Writes this process as the owner, with the next count."""
        self._count += 1
        owner = self._self | {"since": self._since, "count": self._count}
        os.pwrite(file, json.dumps(owner).ljust(_LENGTH).encode()[:_LENGTH], 0)
        os.fsync(file)

    def _beat(self) -> None:
        while not self._released.wait(BEAT):
            # a disk that fails costs checkpoints, about which others complain
            with contextlib.suppress(OSError):
                if (other := self._taken_over_by()) is not None:
                    self._say(
                        f"was taken over by process {other.get('pid')} on {other.get('host')}, since this job gave no sign of "
                        f"life for {STALE:.0f} s or its {NAME} was removed: it ends, and the other goes on from the last "
                        "checkpoint"
                    )
                    # the main thread would write into the folder of the other job
                    os._exit(UserError.status)
                if self._file is not None:
                    self._write(self._file)

    def _taken_over_by(self) -> dict[str, Any] | None:
        """The owner that has taken over while this process was stopped; None where there is none."""
        # opened anew, since a network's file system may show an open file as it was
        file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            owner = _read(file)
        finally:
            os.close(file)
        return owner if owner and any(owner.get(key) != value for key, value in self._self.items()) else None

    def release(self) -> None:
        """Gives the folder back."""
        if self._counting is None or self._file is None:
            return
        self._released.set()
        # the number of a closed file may be that of another one at once, into which the thread would write
        self._counting.join()
        file, self._file, self._counting = self._file, None, None
        # removed before the kernel's lock ends, so that nobody takes over a file without a name
        with contextlib.suppress(OSError):
            if _is_file_at(file, self.path):
                self.path.unlink()
        os.close(file)


def _user(number: int) -> str:
    try:
        return f"the user {pwd.getpwuid(number).pw_name}"
    except KeyError:
        return f"the user of number {number}"


def _is_file_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except OSError:
        return False


def _read(file: int) -> dict[str, Any] | None:
    """What the owner wrote; None where it wrote nothing that can be read."""
    try:
        found = json.loads(os.pread(file, _LENGTH, 0))
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


@contextlib.contextmanager
def held(folder: Path, key: str) -> Iterator[None]:
    """Holds a folder while the block runs; as `FolderLock`."""
    lock = FolderLock(folder, key)
    lock.acquire()
    try:
        yield
    finally:
        lock.release()
