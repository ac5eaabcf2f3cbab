"""Makes the folder of a run, and holds it for one job."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from scalekd_ds.cluster.folder_lock import held
from scalekd_ds.errors import UserError


def make_run_dir(run_dir: Path) -> Path:
    """Makes the run's folder where it does not exist, and returns it.

    Only its user may read and write it, because a resumed run trusts the files in it.

    Raises:
        UserError: The folder cannot be made.
    """
    try:
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        run_dir.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise UserError(f"run.dir is {str(run_dir)!r}, which cannot be made: {error}.") from None
    return run_dir


@contextlib.contextmanager
def held_run_dir(run_dir: Path) -> Iterator[None]:
    """Makes the run's folder, and keeps other jobs out of it while the block runs; on rank 0, for its whole job.

    Raises:
        UserError: The folder cannot be made, or another job trains in it.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    new = not run_dir.exists()
    make_run_dir(run_dir)
    try:
        with held(run_dir, "run.dir"):
            yield
    finally:
        # a start that fails leaves nothing behind
        if new:
            with contextlib.suppress(OSError):
                run_dir.rmdir()
