"""Shows how far a cache is, over all ranks."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from scalekd_ds.process.console import readable_console

# seconds between two lines where there is no terminal
_EVERY_S = 30.0


class CacheProgress:
    """A bar on a terminal, and lines elsewhere; use as a context manager.

    Args:
        total: Images of all views.
        done: Those that are there already.
        store: The job's store, or None for a single rank.
        shown: Whether this rank shows it.
    """

    def __init__(self, total: int, done: int, store: Any, shown: bool) -> None:
        self.total, self.done, self._store, self._shown = total, done, store, shown
        self._own = 0
        self._start = self._said = time.monotonic()
        console = readable_console(stderr=True)
        self._is_bar = shown and console.is_terminal
        columns = (TextColumn("cache"), BarColumn(), MofNCompleteColumn(), TextColumn("images, {task.fields[rate]}"))
        self._bar = Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console)
        self._task = self._bar.add_task("cache", total=total, completed=done, rate="")

    def __enter__(self) -> CacheProgress:
        if self._is_bar:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._is_bar:
            self._bar.stop()

    def advance(self, count: int) -> None:
        """Counts images of this rank."""
        self._own = count + self._own if self._store is None else self._store.add("cached", count)
        if not self._shown:
            return
        now = time.monotonic()
        rate = self._own / max(1e-9, now - self._start)
        if self._is_bar:
            self._bar.update(self._task, completed=self.done + self._own, rate=f"{rate:,.0f}/s")
        elif now - self._said > _EVERY_S:
            self._said = now
            left = (self.total - self.done - self._own) / max(1e-9, rate)
            line = f"cache: {self.done + self._own:,} of {self.total:,} images, {rate:,.0f} images/s, {left / 60:,.0f} min left"
            print(line, file=sys.stderr, flush=True)

    def rate(self) -> float:
        """Images per second of all ranks so far."""
        return self._own / max(1e-9, time.monotonic() - self._start)
