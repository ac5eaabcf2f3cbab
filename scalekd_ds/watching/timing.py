"""Times the parts of a step: by CUDA events on a GPU, which need no synchronisation, and by the clock on a CPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# parts of a step that do not overlap; `communication` is also timed, inside of these
PARTS = ("data_wait", "teacher", "student", "projectors", "losses", "backward", "optimizer")


class StepTimer:
    """Sums the time of named parts over the steps between two calls of `read`.

    On a GPU a part is measured between two events on the current stream, whose times are read by `read`.

    Args:
        device: The device that computes.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.reset()

    def reset(self) -> None:
        """Starts a new window, and forgets the time of the last one."""
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._start = time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Context manager that times a block; `data_wait` is timed on the host, also on a GPU."""
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
        """Wall seconds since the last read and the share of each part in them; starts a new window.

        On a GPU it waits for the device.
        """
        if self._events:
            torch.cuda.synchronize()
        for name, begin, end in self._events:
            self._seconds[name] = self._seconds.get(name, 0.0) + begin.elapsed_time(end) / 1e3
        wall = time.perf_counter() - self._start
        shares = {name: seconds / wall for name, seconds in self._seconds.items()}
        self.reset()
        return wall, shares
