"""Where a step's time goes: CUDA events on a GPU, so that measuring never waits; the clock on a CPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# one after the other in a step, so that the rest is what none of them covers; communication runs inside of them
PARTS = ("data_wait", "teacher", "student", "projectors", "losses", "backward", "optimizer")


class StepTimer:
    """Adds up named parts of many steps, and the wall time between two reads.

    On a GPU a part is measured between two events on the current stream, and read when `read` is called.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.reset()

    def reset(self) -> None:
        """Starts a new window now."""
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._start = time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Times a block; waiting for data is the host's time on a GPU too."""
        if self.cuda and name != "data_wait":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((name, begin, end))
            return
        begin_s = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - begin_s

    def read(self) -> tuple[float, dict[str, float]]:
        """Wall seconds of the window, and the share of each part in it; starts a new window."""
        if self._events:
            torch.cuda.synchronize()
        for name, begin, end in self._events:
            self._seconds[name] = self._seconds.get(name, 0.0) + begin.elapsed_time(end) / 1e3
        wall = time.perf_counter() - self._start
        shares = {name: seconds / wall for name, seconds in self._seconds.items()}
        self.reset()
        return wall, shares
