"""Preemption: after SIGTERM or SIGUSR1 on any rank, all ranks stop after the same step, in time to save a checkpoint."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import distributed

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preemption:
    """Agrees between all ranks whether to stop after a step; use as a context manager around training.

    At each step a flag is reduced over gloo, asynchronously, and the result is read one step later. So no accelerator waits
    for it, and every rank reads the same result at the same step.

    Args:
        on_signal: Called by the handler of the signals.

    Attributes:
        signal: Name of the signal that this rank got, or None.
    """

    def __init__(self, on_signal: Callable[[], None]) -> None:
        self._on_signal = on_signal
        self.signal: str | None = None
        self._previous_handlers: dict[int, Any] = {}
        self._pending: tuple[Any, torch.Tensor] | None = None
        single = not distributed.is_initialized() or distributed.get_world_size() == 1
        self._group = None if single else distributed.new_group(backend="gloo")

    def __enter__(self) -> Preemption:
        # Python lets only the main thread install signal handlers
        if threading.current_thread() is threading.main_thread():
            self._previous_handlers = {number: signal.signal(number, self._handle_signal) for number in SIGNALS}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _handle_signal(self, number: int, _: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        self._on_signal()

    def stop(self) -> bool:
        """Whether all ranks stop after this step. Collective: every rank calls it once a step."""
        if self._group is None:
            return self.signal is not None
        stop = False
        if self._pending is not None:
            work, flag = self._pending
            work.wait()
            stop = bool(flag.item())
        flag = torch.tensor(float(self.signal is not None))
        self._pending = distributed.all_reduce(flag, distributed.ReduceOp.MAX, self._group, async_op=True), flag
        return stop
