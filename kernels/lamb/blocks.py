"""The tables in which LAMB's kernels find their layers: made on the host, once for layers that stay where they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

# elements of a block, and blocks of a layer that a program adds up at once
BLOCK, SUMS_BLOCK = 2048, 1024
# elements in 16 bytes, which a program reads at once in blocks that begin at a multiple of them
_VECTOR = 4


class Place(NamedTuple):
    """Where a segment of a layer lies: the tensor, its first element there, its elements, and the layer."""

    tensor: int
    start: int
    elements: int
    layer: int


class Blocks(NamedTuple):
    """The blocks of segments of layers.

    Attributes:
        table: (blocks, 4) int64, `blocks` of triton_kernels.
        runs: (segments, 3) int64, `runs` of `sums_kernel`.
        turns: Of `sums_kernel`.
        elements: Of all segments together.
    """

    table: torch.Tensor
    runs: torch.Tensor
    turns: int
    elements: int


def blocks_of(places: Sequence[Place], device: torch.device) -> Blocks:
    """The blocks of segments, no two of which are of one layer."""
    table: list[tuple[int, int, int, int]] = []
    runs: list[tuple[int, int, int]] = []
    for tensor, start, elements, layer in places:
        begin, at, end = len(table), start, start + elements
        while at < end:
            # the first block is shorter where the others would not be aligned
            size = min(BLOCK - at % _VECTOR, end - at)
            table.append((tensor, at, size, layer))
            at += size
        runs.append((layer, begin, len(table)))
    return Blocks(
        torch.tensor(table, dtype=torch.int64, device=device).view(-1, 4),
        torch.tensor(runs, dtype=torch.int64, device=device).view(-1, 3),
        max((-(-(end - begin) // SUMS_BLOCK) for _, begin, end in runs), default=0),
        sum(place.elements for place in places),
    )
