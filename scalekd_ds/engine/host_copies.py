"""Memory of the host that takes the same tensors again at every checkpoint."""

from __future__ import annotations

import torch


class HostCopies:
    """Copies of tensors on the CPU, each in the memory that it had the last time.

    The kernel would clear every page of fresh memory first. For a GPU's tensors the memory is pinned. A copy is good until
    the next one under the same key.
    """

    def __init__(self) -> None:
        self._kept: dict[str, torch.Tensor] = {}

    def __call__(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """Copies `tensor`, contiguously."""
        tensor, kept = tensor.detach(), self._kept.get(key)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._kept[key] = kept
        return kept.copy_(tensor)
