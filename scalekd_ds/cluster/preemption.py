"""A polite end: SIGTERM or SIGUSR1 on any rank, and all ranks stop at the same step, in time to save."""

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
    """Asks all ranks at each step whether one was told to stop; use as a context manager around training.

    The question is a reduction of one number over gloo that runs beside the step and is read a step later: no
    accelerator waits for it, and every rank reads the same answer at the same step.

    Args:
        told: Called in the signal's handler.

    Attributes:
        signal: Name of the signal that this rank got, or None.
    """

    def __init__(self, told: Callable[[], None]) -> None:
        self._on_signal = told
        self.signal: str | None = None
        self._before: dict[int, Any] = {}
        self._asked: tuple[Any, torch.Tensor] | None = None
        alone = not distributed.is_initialized() or distributed.get_world_size() == 1
        self._group = None if alone else distributed.new_group(backend="gloo")

    def __enter__(self) -> Preemption:
        # only the main thread of a process may
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._told) for number in SIGNALS}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _told(self, number: int, _: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        self._on_signal()

    def stop(self) -> bool:
        """Whether all ranks stop after this step; collective, called once a step by every rank."""
        if self._group is None:
            return self.signal is not None
        stop = False
        if self._asked is not None:
            work, flag = self._asked
            work.wait()
            stop = bool(flag.item())
        flag = torch.tensor(float(self.signal is not None))
        self._asked = distributed.all_reduce(flag, distributed.ReduceOp.MAX, self._group, async_op=True), flag
        return stop
