"""Runs a program on a pseudo-terminal, as a user sees it."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import termios
from pathlib import Path

from launching import LIMIT


def on_a_terminal(command: list, columns: int, cwd: Path, env: dict[str, str]) -> tuple[int, str]:
    """The exit status of a program on a terminal of 40 lines, and all that it wrote, control sequences among it."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    process = subprocess.Popen([*map(str, command)], cwd=cwd, env=env, stdin=follower, stdout=follower, stderr=follower)
    os.close(follower)
    shown = b""
    while True:
        try:
            chunk = os.read(leader, 65_536)
        except OSError:
            # the last process that held the terminal has ended
            break
        if not chunk:
            break
        shown += chunk
    os.close(leader)
    return process.wait(LIMIT), shown.decode()
