"""Writes checkpoints in a thread while training goes on.

The state is copied before the next update of the weights, and written to the disk before the next checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

from deepspeed import comm as dist
from safetensors import SafetensorError

from scalekd_ds.checkpoint.layout import LATEST, checkpoints_of, read_latest, read_state
from scalekd_ds.checkpoint.manifest import write_manifest
from scalekd_ds.engine.host_copies import HostCopies
from scalekd_ds.errors import UserError, cure_of, problem_of
from scalekd_ds.files.durable import sync, write_json
from scalekd_ds.models.card import EVALUATION
from scalekd_ds.names import one_line

# limit on the time that the slowest rank writes; the heartbeat notices a rank that died long before
_WRITE_TIMEOUT = timedelta(hours=2)


class Saver:
    """Writes one checkpoint at a time in a thread of each rank: all write their files, then rank 0 publishes them.

    A checkpoint that cannot be written, because the disk is full or fails, leaves the earlier ones as they are: rank 0
    prints a warning, and training goes on.

    Args:
        run_dir: The run's folder.
        keep_last: Number of newest checkpoints to keep.
        keep_best: Number of further checkpoints to keep, those with the best `top1` in their state.
        store: The run's key-value store, or None where the job has one rank.

    Attributes:
        copies: Host memory for the tensors of the checkpoint; call `wait_written` before using it.
    """

    def __init__(self, run_dir: Path, keep_last: int, keep_best: int, store: Any = None) -> None:
        self.folder, self.keep_last, self.keep_best = run_dir / "checkpoints", keep_last, keep_best
        self._latest = run_dir / LATEST
        self._store: Any = store.clone() if store is not None else None
        self.copies = HostCopies()
        self._pool = ThreadPoolExecutor(1, "save-checkpoint")
        self._pending: tuple[Path, Future] | None = None
        self._noted: Future | None = None
        self._copied = threading.Event()
        self._copied.set()
        self._count = 0

    def start(self, step: int, capture: Callable[[], Callable[[Path], None]]) -> Path:
        """Begins a checkpoint once the one before it is written; collective.

        Args:
            step: Optimizer step.
            capture: Function that the thread calls during the next forward and backward pass. It copies what is to be
                saved, and returns a function that writes this rank's files from the copies into a given folder.

        Returns:
            The folder of the checkpoint, which exists once it is finished.
        """
        self.wait_written()
        final = self.folder / f"step{step:08d}"
        partial = final.with_name(f".partial-{final.name}")
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        dist.barrier()
        self._count += 1
        self._copied.clear()
        self._pending = final, self._pool.submit(self._save, self._count, partial, final, capture)
        return final

    def wait_copied(self) -> None:
        """Waits until the state is copied; weights and optimizer may change from then on."""
        self._copied.wait()

    def wait_written(self) -> str | None:
        """Waits until the pending checkpoint is written.

        Returns:
            Why it could not be written, or None; the same on every rank.
        """
        if self._pending is None:
            return None
        final, future = self._pending
        self._pending = None
        problem = future.result()
        if problem and dist.get_rank() == 0:
            kept = _newest_name(self.folder)
            before = f"{kept} is kept" if kept else "there is none before it"
            message = f"checkpoint {final.name} could not be written ({problem}); {before}, and training goes on"
            print(one_line(f"warning: {message}: {cure_of(problem)}."), file=sys.stderr, flush=True)
        return problem

    def note_evaluation(self, step: int, evaluation: dict[str, Any]) -> None:
        """Adds what was measured after a checkpoint was begun: a checkpoint must not wait for its evaluation, which may fail.

        The file is no part of the manifest, since it appears later. Without a checkpoint of this step it is not written.

        Args:
            step: The optimizer step.
            evaluation: What `read_evaluation` returns.
        """
        if dist.get_rank() == 0:
            self._noted = self._pool.submit(self._note, self.folder / f"step{step:08d}", evaluation)

    def _note(self, checkpoint: Path, evaluation: dict[str, Any]) -> None:
        def note() -> None:
            if checkpoint.is_dir():
                write_json(checkpoint / EVALUATION, evaluation)
                self._delete_old()

        if problem := _error_of(note):
            message = f"the accuracy could not be added to {checkpoint.name} ({problem}), and training goes on"
            print(one_line(f"warning: {message}: {cure_of(problem)}."), file=sys.stderr, flush=True)

    def finish(self, shipped: Path | None = None) -> None:
        """Waits for the last checkpoint, and ends the thread.

        Args:
            shipped: The file of the run's student where that is written, for the message.

        Raises:
            UserError: The last checkpoint could not be written.
        """
        problem = self.wait_written()
        # waits for a note, too
        self._pool.shutdown()
        if problem:
            kept = _newest_name(self.folder)
            cure = cure_of(problem)
            then = f"then go on from {kept} with --run.resume auto" if kept else "then start anew"
            if shipped is not None:
                cure = f"the student of the whole run is in {shipped}; only to train it further, {cure}"
            raise UserError(f"the last checkpoint could not be written to {self.folder} ({problem}): {cure}, {then}.")

    def _save(
        self, number: int, partial: Path, final: Path, capture: Callable[[], Callable[[Path], None]]
    ) -> str | None:
        """Runs in the thread: writes this rank's files, and agrees on the outcome with the other ranks."""
        problem = _error_of(lambda: self._write(partial, capture))
        rank, world_size = dist.get_rank(), dist.get_world_size()
        if self._store is None:
            return self._publish_or_discard(partial, final, problem)
        prefix = f"save/{number}"
        if rank == 0:
            problems = [problem] + [self._wait_for(f"{prefix}/{r}") for r in range(1, world_size)]
            result = self._publish_or_discard(partial, final, next((p for p in problems if p), None))
            self._store.set(prefix, json.dumps(result))
            return result
        self._store.set(f"{prefix}/{rank}", json.dumps(problem))
        return self._wait_for(prefix)

    def _write(self, partial: Path, capture: Callable[[], Callable[[Path], None]]) -> None:
        try:
            write = capture()
        finally:
            self._copied.set()
        partial.mkdir(parents=True, exist_ok=True)
        write(partial)

    def _wait_for(self, key: str) -> str | None:
        """The problem, or None, that another rank sets under `key` in the store."""
        self._store.wait([key], _WRITE_TIMEOUT)
        return json.loads(self._store.get(key))

    def _publish_or_discard(self, partial: Path, final: Path, problem: str | None) -> str | None:
        """Publishes the checkpoint, or deletes its files where a rank had a problem; returns the problem, or None."""
        problem = problem or _error_of(lambda: self._publish(partial, final))
        if problem:
            shutil.rmtree(partial, ignore_errors=True)
        return problem

    def _publish(self, partial: Path, final: Path) -> None:
        """Gives a complete checkpoint its final name, and deletes the ones that are no longer kept."""
        write_manifest(partial)
        # a resumed run that ends without a step saves the same step again
        before = _set_aside(final) if final.exists() else None
        try:
            partial.rename(final)
            sync(final.parent)
        except OSError:
            # all as it was: what is not known to be on the disk must not be taken for the newest
            with contextlib.suppress(OSError):
                if final.exists():
                    final.rename(partial)
            with contextlib.suppress(OSError):
                if before is not None:
                    before.rename(final)
            raise
        if before is not None:
            with contextlib.suppress(OSError):
                _remove(before)
        # the checkpoint is whole from here on. Where its name cannot be noted, an older one is named, which is not deleted
        problem = _error_of(lambda: write_json(self._latest, {"checkpoint": final.name})) or _error_of(self._delete_old)
        if problem:
            text = f"{final.name} is saved, but {self._latest} or an old checkpoint could not be changed ({problem})"
            print(f"warning: {text}", file=sys.stderr, flush=True)

    def _delete_old(self) -> None:
        """Deletes the checkpoints that are no longer kept, and never the one that is named as the newest."""
        newest = read_latest(self._latest)
        # what a user keeps beside them under a name of their own is none of the run's
        found = checkpoints_of(self.folder.parent)
        best = sorted(found, key=_top1, reverse=True)[: self.keep_best]
        for old in found[: -self.keep_last]:
            if old.name != newest and (old not in best or _top1(old) < 0.0):
                _remove(_set_aside(old))


def _error_of(work: Callable[[], None]) -> str | None:
    """Runs `work`, and returns the message of its error in one line, or None."""
    try:
        work()
    except OSError as error:
        return problem_of(error)
    except (RuntimeError, SafetensorError, UserError) as error:
        return " ".join(str(error).split()) or type(error).__name__
    return None


def _set_aside(folder: Path) -> Path:
    """Renames a checkpoint that is to be deleted, so that a kill meanwhile leaves no incomplete one under a valid name."""
    doomed = folder.with_name(f".partial-old-{folder.name}")
    with contextlib.suppress(OSError):
        _remove(doomed)
    return folder.rename(doomed)


def _remove(folder: Path) -> None:
    """Deletes a folder; of one that was moved elsewhere only the link that was left in its place."""
    folder.unlink() if folder.is_symlink() else shutil.rmtree(folder)


def _top1(checkpoint: Path) -> float:
    """The top-1 accuracy in percent of the checkpoint's last evaluation, -1 where there was none."""
    try:
        return float(read_state(checkpoint)["top1"])
    # UserError is a ValueError
    except (OSError, ValueError, KeyError, TypeError):
        return -1.0


def _newest_name(folder: Path) -> str | None:
    """The name of the newest checkpoint in `folder`, or None."""
    return max((p.name for p in checkpoints_of(folder.parent)), default=None)
