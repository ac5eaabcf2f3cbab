"""Room on a disk, as commands ask for it before they begin to fill one."""

from __future__ import annotations

import os
from pathlib import Path


def free_bytes(folder: Path) -> int | None:
    """Bytes that this user may still write below a folder; None where the file system does not say, as some of networks."""
    try:
        disk = os.statvfs(folder)
    except OSError:
        return None
    return disk.f_bavail * disk.f_frsize if disk.f_blocks else None
