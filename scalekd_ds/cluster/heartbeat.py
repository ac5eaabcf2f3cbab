"""Detects ranks that died or hang: every rank writes heartbeats to the job's TCPStore, and reads those of the others.

A collective whose peer has disappeared behind a cut link hangs for ever, whatever time-out the process group was given, and
does not say which rank is gone. Two threads of each rank find out: one exchanges heartbeats through the store, and the other
ends the process, naming the lost rank, when a heartbeat is overdue.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from scalekd_ds.errors import UserError
from scalekd_ds.names import escape, one_line

# exit status of a rank that ends because another one is lost
EXIT_LOST = 70
# seconds between two heartbeats
_INTERVAL_S = 1.0
# seconds by which a thread that waits is late only where its process was stopped
_STOPPED_S = 3.0
# least seconds without progress, until there was some: models are built and kernels compiled before the first step is done
_FIRST_STEP_S = 1800.0
# least seconds for the first sign of life of a rank, which has met the others
_FIRST_BEAT_S = 10.0
# seconds by which a lost rank is sooner noticed than the broken connections to it
_NETWORK_S = 5.0


class Beat(NamedTuple):
    """One heartbeat of a rank, as it is written to the store.

    Attributes:
        host: Name of the rank's machine.
        pid: Number of the rank's process.
        step: The rank's optimizer step.
        progress: How often the rank has called `Heartbeat.progress`.
        number: Number of the heartbeat, counted from 0.
        end: `done` or the exception with which the rank ended, or None while it runs.
    """

    host: str
    pid: int
    step: int
    progress: int
    number: int
    end: str | None

    def __str__(self) -> str:
        return f"on {self.host} (process {self.pid}, step {self.step})"


class RankLostError(UserError):
    """Another rank failed, died or cannot be reached; the job can be started again without a change."""

    status = EXIT_LOST


class Heartbeat:
    """Monitors all ranks of a job from each of them; use as a context manager around building and training.

    An error of the transport that leaves the context is replaced by a `RankLostError` where a lost rank has caused it.

    Args:
        store: The run's key-value store, or None for a single rank, where only hangs are detected.
        rank: This rank.
        world_size: Number of ranks.
        folder: Where a hanging rank writes the stacks of its threads.
        rank_timeout: Seconds without a heartbeat from another rank after which this one exits.
        hang_timeout: Seconds without progress on any rank, though all of them send heartbeats, after which each writes
            its stacks and exits; 0 waits for ever. Until there was any progress it is half an hour at least.
        network_error: What is wrong with the connections that collectives use, or None; called every second. A rank exits
            where it tells of an error for longer than `rank_timeout`, and no rank is lost.
        hint: What to do about a lost rank, as a sentence.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        world_size: int,
        folder: Path,
        rank_timeout: float,
        hang_timeout: float,
        network_error: Callable[[], str | None] = lambda: None,
        hint: str = "The last checkpoint is intact: start again with --run.resume auto.",
    ) -> None:
        self.rank, self.world_size, self.folder = rank, world_size, folder
        self.rank_timeout, self.hang_timeout = rank_timeout, hang_timeout
        self._network_error, self.hint = network_error, hint
        self._broken_since: float | None = None
        self.step = 0
        self._progress = 0
        self._end: str | None = None
        # the error for which lost ranks were looked for already
        self._searched: BaseException | None = None
        # the last new heartbeat of each other rank, and when it came
        self._received: dict[int, tuple[Beat, float]] = {}
        self._began_at = self._store_answered_at = self._progress_at = time.monotonic()
        self._last_progress = (-1, -1)
        self._stopped = threading.Event()
        # a connection of its own, so that a heartbeat never waits for another thread's request to the store
        self._store: Any = store.clone() if store is not None else None
        if self._store is not None:
            self._store.set_timeout(timedelta(seconds=max(1.0, rank_timeout / 3)))

    def __enter__(self) -> Heartbeat:
        targets = [self._monitor] + ([self._exchange] if self._store is not None else [])
        self._threads = [threading.Thread(target=t, name=f"heartbeat-{t.__name__}", daemon=True) for t in targets]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: Any) -> None:
        ending = error
        if isinstance(error, RuntimeError) and error is not self._searched:
            try:
                self.raise_if_lost(error)
            except RankLostError as lost:
                ending = lost
        first = " ".join(str(ending).split())[:200] if ending is not None else ""
        self._end = "done" if ending is None else f"{type(ending).__name__}: {first}"
        self._stopped.set()
        for thread in self._threads:
            thread.join(2 * _INTERVAL_S)
        if ending is not None and ending is not error:
            raise ending from error

    def progress(self, step: int | None = None) -> None:
        """Records that this rank has done a step, a batch of an evaluation, or a part of a checkpoint.

        Args:
            step: The optimizer step that is done; None keeps the last one.
        """
        self.step = self.step if step is None else step
        self._progress += 1

    def shorten_timeout(self) -> None:
        """Lowers the rank timeout to 5 s, since other ranks end soon after a signal to stop."""
        self.rank_timeout = min(self.rank_timeout, 5.0)

    def raise_if_lost(self, error: RuntimeError) -> None:
        """Replaces `error` with the reason, if it was caused by another rank that failed or disappeared.

        A collective with a lost rank fails with an error of the transport, which does not name the rank. The launcher soon
        sends a signal where a rank has died: call it where signals are handled, if it is not to end this process first.

        Raises:
            RankLostError: Other ranks are lost; the message names them.
        """
        self._searched = error
        if found := self.lost_ranks(wait=8.0):
            raise RankLostError(f"{found}. {self.hint}") from error

    def lost_ranks(self, wait: float = 0.0) -> str | None:
        """Describes the ranks that failed or have sent no heartbeat for 3 s; None if there are none.

        Args:
            wait: Seconds to keep looking until there is one.
        """
        end = time.monotonic() + wait
        while self._store is not None:
            found = self._find_lost(3.0 * _INTERVAL_S, include_failed=True)
            if found or time.monotonic() >= end:
                return "; ".join(found) or None
            time.sleep(0.2)
        return None

    # -- the threads ---------------------------------------------------------------------------------------------

    def _key(self, rank: int) -> str:
        return f"beat/{rank}"

    def _exchange(self) -> None:
        """Body of the thread that writes this rank's heartbeats and reads those of the others."""
        host, pid, store = socket.gethostname(), os.getpid(), self._store
        others = [r for r in range(self.world_size) if r != self.rank]
        stopping = False
        for number in itertools.count():
            try:
                store.set(self._key(self.rank), json.dumps([host, pid, self.step, self._progress, number, self._end]))
                if stopping:
                    return
                present = [r for r in others if store.check([self._key(r)])]
                values = store.multi_get([self._key(r) for r in present]) if present else []
                now = time.monotonic()
                for r, value in zip(present, values, strict=True):
                    beat = Beat(*json.loads(value))
                    if r not in self._received or self._received[r][0] != beat:
                        self._received[r] = (beat, now)
                self._store_answered_at = now
            except RuntimeError:
                # the store ended with rank 0, or does not answer: the monitor thread notices after the timeout
                if stopping:
                    return
            stopping = self._stopped.wait(_INTERVAL_S)

    def _find_lost(self, timeout: float, include_failed: bool) -> list[str]:
        """A description of each rank without a heartbeat for `timeout` seconds, or that failed: so long ago, or ever.

        NCCL's collectives of the others go on waiting for a rank that failed, and raise nothing.
        """
        now = time.monotonic()
        if now - self._store_answered_at > timeout and self.rank != 0:
            return [f"rank 0's store at {os.environ.get('MASTER_ADDR', '?')} does not answer"]
        found = []
        for rank, (beat, received_at) in sorted(self._received.items()):
            if beat.end not in (None, "done") and (include_failed or now - received_at > timeout):
                found.append(f"rank {rank} {beat} failed: {beat.end}")
            elif beat.end is None and now - received_at > timeout:
                found.append(f"rank {rank} {beat} is dead or cannot be reached")
        if now - self._began_at > max(timeout, _FIRST_BEAT_S):
            silent = (r for r in range(self.world_size) if r != self.rank and r not in self._received)
            found += [f"rank {rank} has met the others, and has not been heard of since" for rank in silent]
        return found

    def _monitor(self) -> None:
        """Body of the thread that ends this process when another rank is lost or all ranks hang."""
        looked_at = time.monotonic()
        while not self._stopped.wait(_INTERVAL_S):
            self._excuse(time.monotonic() - looked_at - _INTERVAL_S)
            looked_at = time.monotonic()
            if self._store is not None and (found := self._find_lost(self.rank_timeout, include_failed=False)):
                self._exit(f"{'; '.join(found)}: no word for {self.rank_timeout:.0f} s.")
            self._exit_if_broken()
            progress = (self._progress, sum(beat.progress for beat, _ in self._received.values()))
            limit = self.hang_timeout if any(progress) else max(self.hang_timeout, _FIRST_STEP_S)
            if progress != self._last_progress:
                self._last_progress, self._progress_at = progress, time.monotonic()
            elif self.hang_timeout and time.monotonic() - self._progress_at > limit:
                steps = {self.rank: self.step} | {r: beat.step for r, (beat, _) in self._received.items()}
                listed = ", ".join(f"rank {r} at step {s}" for r, s in sorted(steps.items()))
                self._exit(f"no rank got on for {limit:.0f} s ({listed}); stacks: {escape(self._dump_stacks())}.")

    def _exit_if_broken(self) -> None:
        """Ends this process where its collectives cannot end any more, though all ranks are alive."""
        error = self._network_error()
        if error is None:
            self._broken_since = None
            return
        since = self._broken_since = self._broken_since or time.monotonic()
        if time.monotonic() - since > self.rank_timeout + _NETWORK_S:
            self._exit(f"{error}, and no rank is lost: look at the network (NCCL_DEBUG=WARN says more).")

    def _excuse(self, seconds: float) -> None:
        """Does not count the time for which this process was stopped: a scheduler that suspends a job stops all ranks."""
        if seconds < _STOPPED_S:
            return
        self._began_at += seconds
        self._store_answered_at += seconds
        self._progress_at += seconds
        if self._broken_since is not None:
            self._broken_since += seconds
        for rank, (beat, received_at) in list(self._received.items()):
            self._received[rank] = (beat, received_at + seconds)

    def _dump_stacks(self) -> str:
        """Writes the stacks of this rank's threads, and returns where they are."""
        path = self.folder / f"rank{self.rank}.txt"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with path.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            # a full disk must not keep a job that hangs from ending
            faulthandler.dump_traceback(all_threads=True)
            return f"above, since {path} cannot be written ({error.strerror})"
        return str(path)

    def _exit(self, reason: str) -> None:
        line = f"error (rank {self.rank} on {socket.gethostname()}): {reason} {self.hint}"
        print(one_line(line), file=sys.stderr, flush=True)
        # the main thread hangs in a collective, where no exception can reach it
        os._exit(EXIT_LOST)
