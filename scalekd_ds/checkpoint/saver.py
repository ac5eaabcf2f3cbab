"""Checkpoints written beside the training: copies have until the next update of the weights, the disk until the next one."""

from __future__ import annotations

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

from scalekd_ds.checkpoint.layout import LATEST
from scalekd_ds.checkpoint.manifest import write_manifest
from scalekd_ds.durable_files import sync, write_json
from scalekd_ds.engine.host_copies import HostCopies
from scalekd_ds.errors import UserError

# of the slowest rank's writing; a rank that died ends the others long before
_PATIENCE = timedelta(hours=2)


class Saver:
    """Finishes one checkpoint at a time in a thread of each rank: all ranks write, rank 0 then makes it count.

    What cannot be written, for want of space or by a fault, leaves the checkpoints before it as they are: rank 0 says so, and
    training goes on to the next one.

    Args:
        run_dir: The run's folder.
        keep_last: Newest checkpoints that are kept.
        keep_best: Checkpoints with the best `top1` in their state that are kept besides.
        store: torch's store of the job, or None on one rank.

    Attributes:
        copies: Where a checkpoint's tensors are kept until they are written; `wait` first.
    """

    def __init__(self, run_dir: Path, keep_last: int, keep_best: int, store: Any = None) -> None:
        self.folder, self.keep_last, self.keep_best = run_dir / "checkpoints", keep_last, keep_best
        self._latest = run_dir / LATEST
        self._store = store.clone() if store is not None else None
        self.copies = HostCopies()
        self._pool = ThreadPoolExecutor(1, "save-checkpoint")
        self._pending: tuple[Path, Future] | None = None
        self._copied = threading.Event()
        self._copied.set()
        self._count = 0

    def start(self, step: int, take: Callable[[], Callable[[Path], None]]) -> Path:
        """Begins checkpoint `step`, once the one before it is done; collective.

        Args:
            step: Optimizer step.
            take: Copies what is to be saved, beside the next forward and backward pass, and returns what writes this rank's
                files from the copies into the folder that it is given.

        Returns:
            Where the finished checkpoint will be.
        """
        self.wait()
        final = self.folder / f"step{step:08d}"
        partial = final.with_name(f".partial-{final.name}")
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        dist.barrier()
        self._count += 1
        self._copied.clear()
        self._pending = final, self._pool.submit(self._run, self._count, partial, final, take)
        return final

    def copied(self) -> None:
        """Until all that is to be saved has been copied: weights and optimizer may change from then on."""
        self._copied.wait()

    def wait(self) -> str | None:
        """Until the checkpoint that is being written is done; returns why it could not be, the same on every rank."""
        if self._pending is None:
            return None
        final, future = self._pending
        self._pending = None
        problem = future.result()
        if problem and dist.get_rank() == 0:
            kept = _newest(self.folder)
            before = f"{kept} is kept" if kept else "there is none before it"
            message = f"checkpoint {final.name} could not be written ({problem}); {before}, and training goes on."
            print(f"warning: {message} Free the disk of {self.folder}.", file=sys.stderr, flush=True)
        return problem

    def finish(self) -> None:
        """At the end of training.

        Raises:
            UserError: The last checkpoint could not be written.
        """
        problem = self.wait()
        self._pool.shutdown()
        if problem:
            kept = _newest(self.folder)
            raise UserError(
                f"the last checkpoint could not be written ({problem}): free the disk of {self.folder}, then go on "
                f"{f'from {kept} with --run.resume auto' if kept else 'with a new run'}."
            )

    # -- the thread ----------------------------------------------------------------------------------------------

    def _run(self, number: int, partial: Path, final: Path, take: Callable[[], Callable[[Path], None]]) -> str | None:
        problem = _problem_of(lambda: self._write(partial, take))
        rank, world_size = dist.get_rank(), dist.get_world_size()
        if self._store is None:
            return self._finished(partial, final, problem)
        prefix = f"scalekd/save/{number}"
        if rank == 0:
            problems = [problem] + [self._told(f"{prefix}/{r}") for r in range(1, world_size)]
            result = self._finished(partial, final, next((p for p in problems if p), None))
            self._store.set(prefix, json.dumps(result))
            return result
        self._store.set(f"{prefix}/{rank}", json.dumps(problem))
        return self._told(prefix)

    def _write(self, partial: Path, take: Callable[[], Callable[[Path], None]]) -> None:
        try:
            write = take()
        finally:
            self._copied.set()
        partial.mkdir(parents=True, exist_ok=True)
        write(partial)

    def _told(self, key: str) -> str | None:
        self._store.wait([key], _PATIENCE)
        return json.loads(self._store.get(key))

    def _finished(self, partial: Path, final: Path, problem: str | None) -> str | None:
        problem = problem or _problem_of(lambda: self._make_it_count(partial, final))
        if problem:
            shutil.rmtree(partial, ignore_errors=True)
        return problem

    def _make_it_count(self, partial: Path, final: Path) -> None:
        write_manifest(partial)
        if final.exists():
            # the same step saved again, by a resumed run that ended at once
            _remove(final)
        partial.rename(final)
        sync(final.parent)
        write_json(self._latest, {"checkpoint": final.name})
        found = sorted(p for p in self.folder.glob("step*") if p.is_dir())
        best = sorted(found, key=_top1, reverse=True)[: self.keep_best]
        for old in found[: -self.keep_last]:
            if old not in best or _top1(old) < 0.0:
                _remove(old)


def _problem_of(work: Callable[[], None]) -> str | None:
    try:
        work()
    except (OSError, RuntimeError, SafetensorError) as error:
        return " ".join(str(error).split()) or type(error).__name__
    return None


def _remove(folder: Path) -> None:
    # renamed first, so that a kill in the middle leaves no half checkpoint under a good name
    doomed = folder.with_name(f".partial-old-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _top1(checkpoint: Path) -> float:
    """Of the checkpoint's last evaluation, -1 where there was none."""
    try:
        return float(json.loads((checkpoint / "state.json").read_text())["top1"])
    except (OSError, ValueError, KeyError, TypeError):
        return -1.0


def _newest(folder: Path) -> str | None:
    return max((p.name for p in folder.glob("step*")), default=None)
