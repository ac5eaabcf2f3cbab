"""Who is still there: every rank tells the job's store that it lives and how far it is, and ends, naming the lost one.

A collective whose peer is gone behind a cut link hangs for ever, whatever time-out the process group was given; nobody
then says which rank it was. Here two threads of each rank do: one speaks to the store, one watches what it heard.
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
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from scalekd_ds.errors import UserError

EXIT_LOST = 70
_EVERY = 1.0
_HINT = "The last checkpoint is intact: start again with --run.resume auto."


class Beat(NamedTuple):
    """What a rank says: where it runs, how far it is, the beat's number, and how it ended if it has."""

    host: str
    pid: int
    step: int
    ticks: int
    number: int
    end: str | None

    def __str__(self) -> str:
        return f"on {self.host} (process {self.pid}, step {self.step})"


class RankLostError(UserError):
    """Another rank failed, died or cannot be reached: the job can be started again as it is."""

    status = EXIT_LOST


class Heartbeat:
    """Watches over the ranks of a job from each of them; use as a context manager around training.

    Args:
        store: torch's TCPStore of the job, or None on one rank: then only a hang is watched for.
        rank: This rank.
        world_size: All ranks.
        folder: Where the stacks of a hang are written.
        silence: Seconds without a word from another rank after which this one ends.
        hang: Seconds in which no rank gets on, though all of them live, after which all write their stacks and end;
            0 waits for ever.
    """

    def __init__(self, store: Any, rank: int, world_size: int, folder: Path, silence: float, hang: float) -> None:
        self.rank, self.world_size, self.folder = rank, world_size, folder
        self.silence, self.hang = silence, hang
        self.step = 0
        self._ticks, self._end = 0, None
        self._heard: dict[int, tuple[Beat, float]] = {}
        self._answered = self._got_on = time.monotonic()
        self._seen = (-1, -1)
        self._stopped = threading.Event()
        # a connection of its own: another thread's wait on the store must not hold up a beat
        self._store = store.clone() if store is not None else None
        if self._store is not None:
            self._store.set_timeout(timedelta(seconds=max(1.0, silence / 3)))

    def __enter__(self) -> Heartbeat:
        targets = [self._watch] + ([self._speak] if self._store is not None else [])
        self._threads = [threading.Thread(target=t, name=f"heartbeat-{t.__name__}", daemon=True) for t in targets]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: Any) -> None:
        first = " ".join(str(error).split())[:200] if error is not None else ""
        self._end = "done" if kind is None else f"{kind.__name__}: {first}"
        self._stopped.set()
        for thread in self._threads:
            thread.join(2 * _EVERY)

    def progress(self, step: int | None = None) -> None:
        """This rank got on: a step, a batch of an evaluation, a part of a checkpoint."""
        self.step = self.step if step is None else step
        self._ticks += 1

    def hurry(self) -> None:
        """The job is being ended: waits for no rank longer than 5 s."""
        self.silence = min(self.silence, 5.0)

    def raise_if_lost(self, error: BaseException) -> None:
        """Where `error` came of a rank that has gone, says so in its place.

        Raises:
            RankLostError: Naming the ranks.
        """
        if found := self.lost(wait=8.0):
            raise RankLostError(f"{found}. {_HINT}") from error

    def lost(self, wait: float = 0.0) -> str | None:
        """The ranks that failed or have been silent for 3 s, after at most `wait` seconds; None where all are there."""
        end = time.monotonic() + wait
        while self._store is not None:
            found = self._silent(3.0 * _EVERY, failed=True)
            if found or time.monotonic() >= end:
                return "; ".join(found) or None
            time.sleep(0.2)
        return None

    # -- the threads ---------------------------------------------------------------------------------------------

    def _key(self, rank: int) -> str:
        return f"scalekd/beat/{rank}"

    def _speak(self) -> None:
        host, pid, store = socket.gethostname(), os.getpid(), self._store
        others = [r for r in range(self.world_size) if r != self.rank]
        stopping = False
        for number in itertools.count():
            try:
                store.set(self._key(self.rank), json.dumps([host, pid, self.step, self._ticks, number, self._end]))
                if stopping:
                    return
                present = [r for r in others if store.check([self._key(r)])]
                values = store.multi_get([self._key(r) for r in present]) if present else []
                now = time.monotonic()
                for r, value in zip(present, values, strict=True):
                    beat = Beat(*json.loads(value))
                    if r not in self._heard or self._heard[r][0] != beat:
                        self._heard[r] = (beat, now)
                self._answered = now
            except RuntimeError:
                # the store went away with rank 0, or does not answer: the watcher counts the seconds
                if stopping:
                    return
            stopping = self._stopped.wait(_EVERY)

    def _silent(self, after: float, failed: bool) -> list[str]:
        now = time.monotonic()
        if now - self._answered > after and self.rank != 0:
            return [f"rank 0's store at {os.environ.get('MASTER_ADDR', '?')} does not answer"]
        found = []
        for rank, (beat, heard) in sorted(self._heard.items()):
            if beat.end not in (None, "done") and failed:
                found.append(f"rank {rank} {beat} failed: {beat.end}")
            elif beat.end is None and now - heard > after:
                found.append(f"rank {rank} {beat} is dead or cannot be reached")
        return found

    def _watch(self) -> None:
        while not self._stopped.wait(_EVERY):
            if self._store is not None and (found := self._silent(self.silence, failed=False)):
                self._leave(f"{'; '.join(found)}: no word for {self.silence:.0f} s.")
            ticks = (self._ticks, sum(beat.ticks for beat, _ in self._heard.values()))
            if ticks != self._seen:
                self._seen, self._got_on = ticks, time.monotonic()
            elif self.hang and time.monotonic() - self._got_on > self.hang:
                steps = {self.rank: self.step} | {r: beat.step for r, (beat, _) in self._heard.items()}
                behind = ", ".join(f"rank {r} at step {s}" for r, s in sorted(steps.items()))
                self._leave(f"no rank got on for {self.hang:.0f} s ({behind}); stacks: {self._dump()}.")

    def _dump(self) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"rank{self.rank}.txt"
        with path.open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        return path

    def _leave(self, why: str) -> None:
        print(f"error (rank {self.rank} on {socket.gethostname()}): {why} {_HINT}", file=sys.stderr, flush=True)
        # the main thread hangs in a collective: no exception would reach it
        os._exit(EXIT_LOST)
