"""Launches of LAMB's kernels, the numbers of a step, and the addresses of its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from scalekd_ds.kernels.lamb import triton_kernels as kernels
from scalekd_ds.kernels.lamb.blocks import BLOCK, SUMS_BLOCK, Blocks

# of a program
WARPS = 8
# both passes then make the same bits of an update
_EXACT = {"enable_fp_fusion": False}


class Numbers(NamedTuple):
    """What a step depends on beside its tensors; see triton_kernels."""

    lerp: float
    beta2: float
    rest2: float
    root_scale: float
    eps_term: float
    weight_decay: float
    lr: float


def numbers_of(step: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> Numbers:
    """The numbers of a step, from 1; Adam's corrections are made in Python's float64."""
    beta1, beta2 = betas
    correction = 1.0 - beta1**step
    root_scale = correction / (1.0 - beta2**step) ** 0.5
    return Numbers(1.0 - beta1, beta2, 1.0 - beta2, root_scale, correction * eps, weight_decay, lr)


def addresses_of(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Where tensors begin in memory."""
    return [tensor.data_ptr() for tensor in tensors]


class Addresses:
    """The addresses of gradients, moments and weights on the device, sent again where one of them is new.

    Args:
        device: Where to.

    Attributes:
        table: (tensors, 4) int64 of the kernels, after `update`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sent: list[int] = []
        self.table = torch.empty(0, 4, dtype=torch.int64, device=device)

    def update(self, columns: Sequence[Sequence[torch.Tensor]]) -> None:
        """Takes lists of gradients, first moments, second moments and weights; the host does not wait for the device.

        The tensors must live until the kernels have been launched.

        Raises:
            ValueError: One of them is not what the kernels take.
        """
        rows = [tensor for row in zip(*columns, strict=True) for tensor in row]
        found = addresses_of(rows)
        if found == self._sent:
            return
        known = self._sent if len(self._sent) == len(found) else [-1] * len(found)
        # most often the gradients alone are new
        for tensor in (t for t, new, old in zip(rows, found, known, strict=True) if new != old):
            if tensor.dtype != torch.float32 or tensor.device != self._device or not tensor.is_contiguous():
                raise ValueError(
                    f"a tensor of LAMB's step is {tensor.dtype} on {tensor.device} with strides {tensor.stride()}: it must "
                    f"be float32 on {self._device}, and contiguous."
                )
        # the allocator of pinned memory keeps it until the copy is made
        sent = torch.empty(len(found), dtype=torch.int64, pin_memory=self._device.type == "cuda")
        sent.copy_(torch.tensor(found, dtype=torch.int64))
        self.table, self._sent = sent.to(self._device, non_blocking=True).view(-1, 4), found


def advance(blocks: Blocks, addresses: Addresses, numbers: Numbers) -> torch.Tensor:
    """Advances the moments; where nothing decays, the weights too.

    Args:
        blocks: Of the layers.
        addresses: Of their tensors.
        numbers: Of the step.

    Returns:
        (blocks, 2) float32, |w|^2 and |u|^2 of each block; empty where nothing decays.
    """
    decays = numbers.weight_decay != 0.0
    count = len(blocks.table)
    partials = torch.empty(count if decays else 0, 2, device=blocks.table.device)
    if count:
        # Triton launches on the current device, whatever the tensors' own is
        with torch.cuda.device_of(blocks.table):
            kernels.advance_kernel[(count,)](
                blocks.table,
                addresses.table,
                partials if decays else None,
                *numbers,
                BLOCK=BLOCK,
                DECAYS=decays,
                num_warps=WARPS,
                **_EXACT,
            )
    return partials


def add_squares(blocks: Blocks, partials: torch.Tensor, squares: torch.Tensor, first_layer: int) -> None:
    """Writes |w|^2 and |u|^2 of the layers that have a segment, of the partial sums that `advance` returned.

    Args:
        blocks: Of the layers.
        partials: (blocks, 2).
        squares: Zeros (2, layers) in float64, which are written to.
        first_layer: Where in `squares` the layers of `blocks` begin.
    """
    if len(blocks.runs):
        with torch.cuda.device_of(squares):
            kernels.sums_kernel[(len(blocks.runs),)](
                partials, blocks.runs, squares, squares.shape[1], first_layer, blocks.turns, BLOCK=SUMS_BLOCK, **_EXACT
            )


def apply(blocks: Blocks, addresses: Addresses, numbers: Numbers, ratios: torch.Tensor, first_layer: int) -> None:
    """Moves the weights by lr times their layer's ratio against the update.

    Args:
        blocks: Of the layers.
        addresses: Of their tensors, as in `advance`.
        numbers: Of the step.
        ratios: (layers,) float64.
        first_layer: Where in `ratios` the layers of `blocks` begin.
    """
    if len(blocks.table):
        with torch.cuda.device_of(ratios):
            kernels.apply_kernel[(len(blocks.table),)](
                blocks.table,
                addresses.table,
                ratios,
                first_layer,
                *numbers[3:],
                BLOCK=BLOCK,
                num_warps=WARPS,
                **_EXACT,
            )
