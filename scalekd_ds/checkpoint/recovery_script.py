"""A script of the name under which DeepSpeed leaves its own in a checkpoint, which says how to get the weights here."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

NAME = "zero_to_fp32.py"
# it runs anywhere, without this library
_SCRIPT = '''#!/usr/bin/env python3
"""Says how to get this checkpoint's student: DeepSpeed's script of this name reads other files."""

import shlex
import sys
from pathlib import Path

folder = Path(__file__).resolve().parent
command = f"scalekd consolidate {shlex.quote(str(folder))} student.safetensors"
sys.exit(f"this checkpoint is not in DeepSpeed's files: take its student, whole and in float32, with\\n    {command}")
'''


def write_recovery_script(folder: Path) -> None:
    """Writes the script into the folder of a checkpoint."""
    (folder / NAME).write_text(_SCRIPT)
    # DeepSpeed's can be started by its name, too
    with suppress(OSError):
        (folder / NAME).chmod(0o700)
