"""Times the parts of a step: by CUDA events on a GPU, which need no synchronisation, and by the clock on a CPU."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# pairs of events from which on those that have passed are read early: ZeRO-3 times thousands of collectives in a step
_MOST_EVENTS = 1000

# parts of a step that do not overlap; `communication` is also timed, inside of these
PARTS = ("data_wait", "teacher", "student", "projectors", "losses", "backward", "optimizer")


class StepTimer:
    """Sums the time of named parts over the steps between two calls of `read`.

    On a GPU a part is measured between two events on the current stream, whose times are read once they have passed.

    Args:
        device: The device that computes.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self._events: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()
        # pairs that are recorded again
        self._free: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.reset()

    def reset(self) -> None:
        """Starts a new window, and forgets the time of the last one."""
        self._seconds: dict[str, float] = {}
        # what is still under way must not be recorded again
        self._events.clear()
        self._start = time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Context manager that times a block; `data_wait` is timed on the host, also on a GPU."""
        if self.cuda and name != "data_wait":
            begin, end = self._free.pop() if self._free else [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            begin.record()
            yield
            end.record()
            self._events.append((name, begin, end))
            if len(self._events) > _MOST_EVENTS:
                self._read_passed()
            return
        begin_s = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - begin_s

    def _read_passed(self) -> None:
        """Adds the times of the events that have passed, up to the first that has not; waits for nothing."""
        while self._events and self._events[0][2].query():
            name, begin, end = self._events.popleft()
            self._seconds[name] = self._seconds.get(name, 0.0) + begin.elapsed_time(end) / 1e3
            self._free.append((begin, end))

    def read(self) -> tuple[float, dict[str, float]]:
        """Wall seconds since the last read and the share of each part in them; starts a new window.

        On a GPU it waits for the device.
        """
        if self._events:
            torch.cuda.synchronize()
        self._read_passed()
        wall = time.perf_counter() - self._start
        shares = {name: seconds / wall for name, seconds in self._seconds.items()}
        self.reset()
        return wall, shares
