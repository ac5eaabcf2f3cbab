"""Events, streams, graphs and memory counters of torch.cuda without a GPU: a host, and a device that runs behind it.

It is for code that times kernels. `Timeline.launch` is what a call on fake tensors would launch, and events around the call
read the device's time, not the host's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

# of the device's clock, in which torch.cuda._sleep counts
CYCLES_PER_S = 2.0e9
# of a kernel that nobody gave a length
KERNEL_S = 1e-6


class Timeline:
    """A host and a device that works off what the host launches.

    Args:
        now: Reads the host's clock, in seconds.
        wait: Called with the seconds for which the host waits for the device.
    """

    def __init__(
        self, now: Callable[[], float] = time.perf_counter, wait: Callable[[float], None] = time.sleep
    ) -> None:
        self.now, self.wait, self.free_at = now, wait, 0.0
        self.captured: float | None = None
        self.refuses_waiting = False

    def launch(self, seconds: float = KERNEL_S) -> None:
        """A kernel that takes so long on the device."""
        if self.captured is not None:
            self.captured += seconds
        else:
            self.free_at = max(self.now(), self.free_at) + seconds

    def synchronise(self, *_: Any) -> None:
        """Waits for the device.

        Raises:
            RuntimeError: A graph is being captured.
        """
        if self.captured is not None:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        if (left := self.free_at - self.now()) > 0:
            self.wait(left)

    def fetch(self) -> None:
        """What `tensor.item()` does.

        Raises:
            RuntimeError: A graph is being captured, or waiting is called an error.
        """
        if self.refuses_waiting:
            raise RuntimeError("called a synchronizing CUDA operation")
        self.synchronise()


def _event_of(timeline: Timeline) -> type:
    class Event:
        def __init__(self, enable_timing: bool = False) -> None:
            self.at: float | None = None

        def record(self, stream: Any = None) -> None:
            self.at = max(timeline.now(), timeline.free_at)

        def query(self) -> bool:
            return self.at is not None and self.at <= timeline.now()

        def synchronize(self) -> None:
            timeline.synchronise()

        def elapsed_time(self, end: Event) -> float:
            return 1e3 * (end.at - self.at)

    return Event


def _graph_of(timeline: Timeline) -> type:
    class Graph:
        seconds = 0.0

        def replay(self) -> None:
            timeline.launch(self.seconds)

    return Graph


class _Stream:
    def __init__(self, device: Any = None, **_: Any) -> None:
        self.device = device

    def wait_stream(self, stream: Any) -> None:
        """Streams are one here."""


@contextmanager
def timed_by(timeline: Timeline) -> Iterator[Timeline]:
    """torch.cuda's calls go to the timeline within."""

    @contextmanager
    def capturing(graph: Any, **_: Any) -> Iterator[None]:
        timeline.captured = 0.0
        try:
            yield
            graph.seconds = timeline.captured
        finally:
            timeline.captured = None

    @contextmanager
    def on(stream: Any) -> Iterator[None]:
        yield

    def refuse(mode: str) -> None:
        timeline.refuses_waiting = mode == "error"

    stubs = {
        "Event": _event_of(timeline),
        "CUDAGraph": _graph_of(timeline),
        "graph": capturing,
        "Stream": _Stream,
        "stream": on,
        "current_stream": _Stream,
        "synchronize": timeline.synchronise,
        "set_sync_debug_mode": refuse,
        "set_device": lambda device: None,
        "_sleep": lambda cycles: timeline.launch(cycles / CYCLES_PER_S),
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda device=None: None,
        "max_memory_allocated": lambda device=None: 2**30,
        "memory_allocated": lambda device=None: 2**29,
        "mem_get_info": lambda device=None: (70 * 2**30, 80 * 2**30),
    }
    with ExitStack() as stack:
        for name, stub in stubs.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stub))
        yield timeline
