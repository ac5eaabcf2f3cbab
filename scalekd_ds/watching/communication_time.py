"""Time of a step's collectives, as DeepSpeed and we call them through `deepspeed.comm`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from deepspeed.comm import comm

_COLLECTIVES = (
    "all_reduce",
    "all_reduce_coalesced",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "broadcast",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_coalesced",
    "all_to_all_single",
    "all_to_all",
)


class _TimedHandle:
    """An asynchronous collective: what counts is the time that its `wait` takes."""

    def __init__(self, handle: Any, part: Callable[[str], AbstractContextManager]) -> None:
        self._handle, self._part = handle, part

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        with self._part("communication"):
            return self._handle.wait(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)


class CommunicationTime:
    """Adds the collectives of `deepspeed.comm`'s backend to a timer's part `communication`; a context manager.

    On a CPU a call counts from its begin to its end, waiting for slower ranks included. On a GPU it is the time between
    two events on the stream that it was called from: all of it where a rank waits for the result, and where gradients are
    reduced beside the backward pass on a stream of their own, the time that this takes there. Either way it is a part of
    backward, optimizer and, with ZeRO-3, of the forward passes, and not beside them.

    Args:
        part: `StepTimer.part`.
    """

    def __init__(self, part: Callable[[str], AbstractContextManager]) -> None:
        self._part, self._inside = part, False

    def __enter__(self) -> CommunicationTime:
        self._backend = comm.cdb
        for name in _COLLECTIVES:
            call = getattr(self._backend, name, None)
            if call is not None:
                # on the object, in front of the class's own method
                setattr(self._backend, name, self._timed(call))
        return self

    def __exit__(self, *_: Any) -> None:
        for name in _COLLECTIVES:
            self._backend.__dict__.pop(name, None)

    def _timed(self, call: Callable) -> Callable:
        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            # a coalesced collective may call another one
            if self._inside:
                return call(*args, **kwargs)
            self._inside = True
            try:
                with self._part("communication"):
                    handle = call(*args, **kwargs)
            finally:
                self._inside = False
            return _TimedHandle(handle, self._part) if hasattr(handle, "wait") else handle

        return timed
