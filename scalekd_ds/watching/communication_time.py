"""Times the collectives of a step, those of DeepSpeed and those of this library, which all go through `deepspeed.comm`."""

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
    """Handle of an asynchronous collective that also times its `wait`."""

    def __init__(self, handle: Any, part: Callable[[str], AbstractContextManager]) -> None:
        self._handle, self._part = handle, part

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        with self._part("communication"):
            return self._handle.wait(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)


class CommunicationTime:
    """Context manager that times the collectives of `deepspeed.comm`'s backend as the part `communication`.

    On a CPU the time of a call includes waiting for slower ranks. On a GPU it is the time between two events on the stream
    of the call: the whole collective if the stream waits for it, and for gradients that are reduced beside the backward pass
    on a stream of their own, the time on that stream. The time is also contained in the parts `backward`, `optimizer` and,
    with ZeRO-3, in those of the forward passes.

    Args:
        part: `StepTimer.part`, which times a named part.
    """

    def __init__(self, part: Callable[[str], AbstractContextManager]) -> None:
        self._part, self._in_collective = part, False

    def __enter__(self) -> CommunicationTime:
        self._backend = comm.cdb
        for name in _COLLECTIVES:
            call = getattr(self._backend, name, None)
            if call is not None:
                # an attribute of the object hides the method of its class
                setattr(self._backend, name, self._timed(call))
        return self

    def __exit__(self, *_: Any) -> None:
        for name in _COLLECTIVES:
            self._backend.__dict__.pop(name, None)

    def _timed(self, call: Callable) -> Callable:
        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            # a collective that is called by another one is timed with it
            if self._in_collective:
                return call(*args, **kwargs)
            self._in_collective = True
            try:
                with self._part("communication"):
                    handle = call(*args, **kwargs)
            finally:
                self._in_collective = False
            return _TimedHandle(handle, self._part) if hasattr(handle, "wait") else handle

        return timed
