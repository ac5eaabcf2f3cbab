"""Host memory for copies of tensors that is used again at every checkpoint."""

from __future__ import annotations

import torch


class HostCopies:
    """Copies tensors to the CPU, each into the same memory as the last copy under its key.

    The kernel would have to clear every page of newly allocated memory. The memory for tensors on a GPU is pinned. A
    copy is valid until the next one under the same key.
    """

    def __init__(self) -> None:
        self._kept: dict[str, torch.Tensor] = {}

    def __call__(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous copy of `tensor` on the CPU, in the memory of `key`."""
        tensor, kept = tensor.detach(), self._kept.get(key)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._kept[key] = kept
        return kept.copy_(tensor)
