"""Makes the folder of a run."""

from __future__ import annotations

from pathlib import Path

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
