"""Makes the folder of a run, and holds it for one job."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from scalekd_ds.cluster.folder_lock import held
from scalekd_ds.config import RunConfig
from scalekd_ds.errors import UserError, cure_of, problem_of
from scalekd_ds.files.durable import write_json
from scalekd_ds.files.room import free_bytes


def make_run_dir(run_dir: Path) -> Path:
    """Makes the run's folder where it does not exist, and returns it.

    Only its user may read and write it, because a resumed run trusts the files in it.

    Raises:
        UserError: The folder cannot be made.
    """
    # a run would else find out at its first checkpoint
    for folder, what in ((run_dir, "run.dir is"), (run_dir / "checkpoints", "the run's checkpoints go to")):
        if folder.is_symlink() and not folder.exists():
            raise UserError(
                f"{what} {str(folder)!r}, a link to {os.readlink(folder)!r}, which is not there: mount it, or correct the link."
            )
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{what} {str(folder)!r}, which is no folder: move it away, or choose another run.dir.")
    try:
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        run_dir.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise UserError(f"run.dir is {str(run_dir)!r}, which cannot be made: {error}.") from None
    return run_dir


def check_apart(cfg: RunConfig) -> None:
    """Checks that the run's folders will not be taken for classes when it goes on.

    Raises:
        UserError: `run.dir` is the folder of the training or validation images, or lies where that has its classes.
    """
    run_dir = os.path.realpath(cfg.run.dir)
    for key, name in (("data.train", cfg.data.train), ("data.val", cfg.data.val)):
        images = os.path.realpath(os.path.join(cfg.data.root, name))
        if os.path.isdir(images) and images in (run_dir, os.path.dirname(run_dir)):
            raise UserError(
                f"run.dir is {cfg.run.dir!r}, where {key} has its classes, for which the run's folders would be taken: choose "
                "another."
            )


def write_config(run_dir: Path, cfg: RunConfig) -> None:
    """Writes the run's configuration into its folder, which is made where it does not exist.

    Raises:
        UserError: The folder or the file cannot be written, as the checkpoints could not be.
    """
    try:
        write_json(make_run_dir(run_dir) / "config.json", cfg.as_dict())
    except OSError as error:
        raise UserError(
            f"run.dir is {str(run_dir)!r}, which cannot be written ({problem_of(error)}): {cure_of(problem_of(error))}."
        ) from None


def set_results_aside(run_dir: Path) -> None:
    """Keeps the results of an earlier end of a run that goes on under another name: they are not those of its config.json."""
    results = run_dir / "results.json"
    with contextlib.suppress(OSError):
        if results.exists():
            results.rename(run_dir / "results.before.json")


def check_room(run_dir: Path, needed: int) -> None:
    """Checks that what is trained can be saved: a run on a full disk would lose all of it, hours later.

    Args:
        run_dir: The run's folder.
        needed: Bytes of a checkpoint and of the student's file, at least.

    Raises:
        UserError: The disk has less.
    """
    free = free_bytes(run_dir)
    if free is not None and free < needed:
        raise UserError(
            f"run.dir is {str(run_dir)!r}, whose disk has {free / 2**20:,.1f} MiB free, and a checkpoint of this run takes "
            f"{needed / 2**20:,.1f} MiB with its student: free space on it, or name another."
        )


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
