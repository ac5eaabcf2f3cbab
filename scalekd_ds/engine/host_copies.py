"""Host memory for copies of tensors that is used again at every checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class HostCopies:
    """Copies tensors to the CPU, each into the same memory as the last copy under its key.

    The kernel would have to clear every page of newly allocated memory. The memory for tensors on a GPU is pinned. A
    copy is valid until the next one under the same key.
    """

    def __init__(self) -> None:
        self._kept: dict[str, torch.Tensor] = {}
        self._stream: torch.cuda.Stream | None = None
        self._waits = True

    def __call__(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous copy of `tensor` on the CPU, in the memory of `key`."""
        tensor, kept = tensor.detach(), self._kept.get(key)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._kept[key] = kept
        return kept.copy_(tensor, non_blocking=tensor.is_cuda and not self._waits)

    def keys(self) -> set[str]:
        """The keys under which there is memory."""
        return set(self._kept)

    @contextmanager
    def beside(self, ready: torch.cuda.Event | None) -> Iterator[None]:
        """A context whose copies are made on a stream of their own, beside what a GPU computes; at its end all are done.

        On the stream of the computation each copy would wait for all kernels that are queued before it. Nothing may change
        the tensors meanwhile.

        Args:
            ready: What comes before it is in the copies; None on a CPU, where nothing is queued. See `now`.
        """
        if ready is None:
            yield
            return
        # a thread begins with the first GPU as its current one, whichever is this rank's
        self._stream = self._stream or torch.cuda.Stream(ready.device)
        self._waits = False
        try:
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(ready)
                yield
        finally:
            self._stream.synchronize()
            self._waits = True


def now(device: torch.device) -> torch.cuda.Event | None:
    """The present end of what is queued on this thread's stream of a GPU, for `HostCopies.beside`; None on a CPU."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
