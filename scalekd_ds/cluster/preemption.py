"""Preemption: after a signal to any rank all ranks stop after the same step, in time to save a checkpoint."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import distributed

from scalekd_ds.process import signals

# seconds after which a step that goes on is worth a word, lest somebody press Ctrl-C again
_PATIENCE_S = 2.0


class Preempted(Exception):
    """All ranks stop here, at the same batch of an evaluation."""


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
        self._caught = ExitStack()
        self._notice = threading.Timer(_PATIENCE_S, _say_that_it_stops)
        self._notice.daemon = True
        self._pending: tuple[Any, torch.Tensor] | None = None
        single = not distributed.is_initialized() or distributed.get_world_size() == 1
        self._group = None if single else distributed.new_group(backend="gloo")

    def __enter__(self) -> Preemption:
        # Python lets only the main thread install signal handlers
        if threading.current_thread() is threading.main_thread():
            self._caught.enter_context(signals.passed_to(self._handle_signal, completes=True))
        return self

    def __exit__(self, *error: Any) -> None:
        self._notice.cancel()
        self._caught.__exit__(*error)

    def _handle_signal(self, _: int, name: str) -> None:
        if self.signal is None and os.environ.get("RANK", "0") == "0":
            self._notice.start()
        self.signal = self.signal or name
        self._on_signal()

    def raise_if_stopped(self) -> None:
        """Raises `Preempted` on all ranks at the same call. Collective, as `stop`, for an evaluation's batches."""
        if self.stop():
            raise Preempted

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


def _say_that_it_stops() -> None:
    print(
        "stopping after this step, with a checkpoint; Ctrl-C again ends at once, without one",
        file=sys.stderr,
        flush=True,
    )
