"""Times calls in turn: by the clock on a CPU, and on a GPU between two events, with the host ahead where kernels are timed.

Python launches a small kernel more slowly than a GPU runs it. Between two events around a plain call stands then the host's
time, not the GPU's. So kernels are replayed from a CUDA graph. A call that cannot be captured gets a head start: the GPU spins
until the host has launched everything. Whole steps are timed as they run, and the host's time is given beside.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

# of a GPU whose clock is not known; a slower one spins longer, which does no harm
CYCLES_PER_S = 2.0e9
LONGEST_HEAD_START_S = 0.1


@dataclass
class Readings:
    """What was read of one variant.

    Attributes:
        how: `clock` on a CPU; on a GPU `graph`, `head start` or `events` (a plain call between two events).
        seconds: One entry a round.
        host_seconds: Seconds after which the call returned to the host, one entry a round.
        host_ahead: On a GPU with a head start, whether the call had returned before the GPU began it, in every round.
        no_graph: Why a call was not captured, in one line.
        error: Why the variant could not be measured, in one line; it then has no seconds.
    """

    how: Literal["clock", "graph", "head start", "events"] = "clock"
    seconds: list[float] = field(default_factory=list)
    host_seconds: list[float] = field(default_factory=list)
    host_ahead: bool | None = None
    no_graph: str | None = None
    error: str | None = None


def device_of(name: str) -> torch.device:
    """The device of a command line, which becomes the current one: events and Triton's kernels go to the current device.

    Raises:
        ValueError: There is no such device.
    """
    try:
        device = torch.device(name)
        if device.type == "cuda":
            torch.cuda.set_device(device.index or 0)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device is {name!r}: it must be a device of this machine ({one_line(error)}).") from None
    return device


def synchronise(device: torch.device) -> None:
    """Waits for the device; a CPU is never behind."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def one_line(error: BaseException) -> str:
    """An error's kind and the start of what it says."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said[:300] if said else 'no message'}"


def wall_seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds by the clock from an idle device to an idle device, for what the host and the device do together."""
    synchronise(device)
    begin = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - begin


def capture(call: Callable[[], Any], device: torch.device) -> torch.cuda.CUDAGraph:
    """A CUDA graph of the call.

    Raises:
        RuntimeError: The call waits for the device, or does something else that a graph cannot hold.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        # libraries make their handles and workspaces for each stream, and may not in a capture
        for _ in range(2):
            call()
        # an operator that waits is named here, before a capture that it would break in the middle
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    graph.replay()
    torch.cuda.synchronize(device)
    return graph


def _by_clock(call: Callable[[], Any]) -> tuple[float, float, None]:
    begin = time.perf_counter()
    call()
    seconds = time.perf_counter() - begin
    return seconds, seconds, None


def _between_events(
    call: Callable[[], Any], device: torch.device, before: Callable[[], Any] | None
) -> tuple[float, float, bool | None]:
    """(GPU seconds, host seconds, whether the host was ahead) of one call, which is launched while `before` runs."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    if before is not None:
        before()
    begin.record()
    started = time.perf_counter()
    call()
    host_seconds = time.perf_counter() - started
    ahead = None if before is None else not begin.query()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3, host_seconds, ahead


def _timer(
    call: Callable[[], Any], device: torch.device, flush: torch.Tensor | None, launched: str, readings: Readings
) -> Callable[[], tuple[float, float, bool | None]]:
    """A function that times one call; it fills `how` and `no_graph` of `readings`."""
    if device.type != "cuda":
        return lambda: _by_clock(call)
    readings.how = "events"
    if launched == "plain":
        return lambda: _between_events(call, device, None)
    # a replay is launched in some microseconds
    head_start = 2e-4
    try:
        replay = capture(call, device).replay
        readings.how = "graph"
    # whatever a call cannot do under capture, it can do with a head start
    except Exception as error:
        replay, readings.how, readings.no_graph = call, "head start", one_line(error)
        torch.cuda.synchronize(device)
        head_start = min(2.0 * _between_events(call, device, None)[1] + 2e-3, LONGEST_HEAD_START_S)

    def before() -> None:
        torch.cuda._sleep(int(head_start * CYCLES_PER_S))
        # after the spinning, so that the cache is cold at the call
        if flush is not None:
            flush.zero_()

    return lambda: _between_events(replay, device, before)


def alternate(
    variants: dict[str, Callable[[], Any]],
    device: torch.device,
    repeats: int,
    warmup: int = 1,
    flush: torch.Tensor | None = None,
    launched: Literal["plain", "ahead"] = "plain",
) -> dict[str, Readings]:
    """Times every call in every round; each round starts one variant further on than the last.

    In turn, because a machine's clock drifts and neighbours come and go: a ratio is only good within a round. A variant that
    raises is noted in its readings, and does not stop the others.

    Args:
        variants: Name -> what is measured.
        device: Where it runs.
        repeats: Rounds.
        warmup: Calls of each variant before the first round.
        flush: With `ahead`, a buffer larger than the last cache, written before each call, so that inputs come from memory
            as they do inside a step.
        launched: On a GPU, `ahead` for kernels, whose own time is asked for, and `plain` for what is timed as it runs.

    Raises:
        ValueError: No rounds.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}: it must be at least 1.")
    readings, timers = {name: Readings() for name in variants}, {}
    for name, call in variants.items():
        try:
            for _ in range(warmup):
                call()
            synchronise(device)
            timers[name] = _timer(call, device, flush, launched, readings[name])
        # the next variant may well run: this one's line says why it did not
        except Exception as error:
            readings[name].error = one_line(error)
    for turn in range(repeats):
        names = [name for name in variants if readings[name].error is None]
        first = turn % max(1, len(names))
        for name in names[first:] + names[:first]:
            read = readings[name]
            try:
                seconds, host_seconds, ahead = timers[name]()
            except Exception as error:
                read.error, read.seconds, read.host_seconds = one_line(error), [], []
                continue
            read.seconds.append(seconds)
            read.host_seconds.append(host_seconds)
            read.host_ahead = ahead if read.host_ahead is None else read.host_ahead and ahead
    return readings


def seconds_of(readings: dict[str, Readings]) -> dict[str, list[float]]:
    """Name -> seconds, where every variant has to have some.

    Raises:
        RuntimeError: A variant could not be measured.
    """
    for name, read in readings.items():
        if read.error is not None:
            raise RuntimeError(f"{name} could not be measured: {read.error}")
    return {name: read.seconds for name, read in readings.items()}


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """median, p20 and p80, linear between the samples."""
    p20, median, p80 = np.quantile(np.asarray(values, dtype=np.float64), [0.2, 0.5, 0.8]).tolist()
    return {"median": median, "p20": p20, "p80": p80}


def summary(readings: Readings) -> dict[str, Any]:
    """A variant's milliseconds and how they were read, or its `error` alone."""
    if readings.error is not None:
        return {"error": readings.error}
    found = {**quantiles([1e3 * s for s in readings.seconds]), "runs": len(readings.seconds), "unit": "ms"}
    found |= {"timed_by": readings.how}
    if readings.how != "clock":
        found["host_ms"] = 1e3 * quantiles(readings.host_seconds)["median"]
    if readings.host_ahead is not None:
        found["host_ahead"] = readings.host_ahead
    if readings.no_graph is not None:
        found["no_graph"] = readings.no_graph
    return found


def speedup(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float]:
    """How many times faster `fast` is, round by round."""
    return quantiles([a / b for a, b in zip(slow, fast, strict=True)])


def peak_memory(call: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that PyTorch's allocator held at most during one call.

    None on a CPU: the resident set also counts what the C library keeps for reuse, and never falls.
    """
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)
