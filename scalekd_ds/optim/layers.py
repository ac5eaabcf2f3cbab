"""Norms and factors of whole layers in flat memory, in a few operations for all layers together.

A tensor in which layers lie one after the other is cut into pieces: segments of layers, and the padding between them. Norms
are those of lists of views, so no layer needs a launch of its own on a GPU. A factor for each layer is spread over its
elements, since no operation multiplies a list of tensors by a list of numbers that only the GPU knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from scalekd_ds.engine.zero_layout import Shard
from scalekd_ds.kernels.lamb import Place

# elements to which factors are spread at once: 256 MiB for the index of each and for its factor
CHUNK = 2**25


@dataclass(frozen=True)
class Cut:
    """How the flattened tensors of one or more shards are cut into pieces.

    Attributes:
        tensors: The tensors that the optimizer updates, which lie one after the other.
        sizes: Elements of each piece of each tensor.
        segments: Indices of the pieces that are segments, over all tensors.
        layers: The layer of each segment, int64 (segments,) on the tensors' device.
        owners: The layer of each piece, int64 (pieces,); that of padding is any, since nobody reads it.
        repeats: Elements of each piece, int32 (pieces,).
        chunks: (first piece, piece after the last, elements) of the runs of pieces that are scaled at once.
        places: Where each segment lies, for the kernels.
        count: Number of layers, whether or not this rank holds a part of them.
    """

    tensors: tuple[torch.Tensor, ...]
    sizes: tuple[list[int], ...]
    segments: list[int]
    layers: torch.Tensor
    owners: torch.Tensor
    repeats: torch.Tensor
    chunks: list[tuple[int, int, int]]
    places: list[Place]
    count: int


def cut_into_layers(shards: Sequence[Shard]) -> Cut:
    """The cut of shards whose flattened tensors lie one after the other, on one device."""
    sizes, segments, places, owners, count = [], [], [], [], 0
    for number, shard in enumerate(shards):
        own, end = [], 0
        # DeepSpeed lays segments out in order
        for segment in shard.segments:
            if segment.start > end:
                own.append(segment.start - end)
                owners.append(count + segment.layer)
            segments.append(len(owners))
            places.append(Place(number, segment.start, segment.count, count + segment.layer))
            owners.append(count + segment.layer)
            own.append(segment.count)
            end = segment.start + segment.count
        if end < shard.flat.numel():
            own.append(shard.flat.numel() - end)
            owners.append(count)
        sizes.append(own)
        count += len(shard.parameters)
    pieces, device = [size for own in sizes for size in own], shards[0].flat.device
    return Cut(
        tuple(shard.flat for shard in shards),
        tuple(sizes),
        segments,
        torch.tensor([place.layer for place in places], dtype=torch.int64, device=device),
        torch.tensor(owners, dtype=torch.int64, device=device),
        torch.tensor(pieces, dtype=torch.int32, device=device),
        _chunks(pieces),
        places,
        count,
    )


def _chunks(pieces: list[int]) -> list[tuple[int, int, int]]:
    """Runs of pieces of at most `CHUNK` elements together; a larger piece is a run of its own."""
    chunks: list[tuple[int, int, int]] = []
    for number, size in enumerate(pieces):
        if chunks and chunks[-1][2] + size <= CHUNK:
            first, _, before = chunks[-1]
            chunks[-1] = (first, number + 1, before + size)
        else:
            chunks.append((number, number + 1, size))
    return chunks


def views_of(cut: Cut, flats: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The segments' views of flat tensors that are cut as those of `cut` are: one for each, or one for all together.

    Args:
        cut: The cut of one or more shards.
        flats: Flat tensors (n,), one for each shard or one for all.

    Returns:
        A flat view for each segment, in the order of the cut.
    """
    sizes = cut.sizes if len(flats) == len(cut.sizes) else [[size for own in cut.sizes for size in own]]
    pieces = [piece for flat, own in zip(flats, sizes, strict=True) for piece in flat.split(own)]
    return [pieces[number] for number in cut.segments]


def add_squared_norms(squares: torch.Tensor, cut: Cut, updates: torch.Tensor) -> None:
    """Writes the squared norms of this rank's segments of each layer: of the tensors, and of `updates`.

    Args:
        squares: Zeros, float64 (2, layers), which are written to.
        cut: The cut.
        updates: What the tensors are to be changed by, flat.
    """
    if not cut.segments:
        return
    views = views_of(cut, [tensor.view(-1) for tensor in cut.tensors]) + views_of(cut, [updates])
    norms = torch.stack(torch._foreach_norm(views)).double().square_()
    squares.index_copy_(1, cut.layers, norms.view(2, -1))


def scale_layers(flat: torch.Tensor, cut: Cut, factors: torch.Tensor) -> None:
    """Multiplies each layer's elements by its factor, in place.

    Args:
        flat: Flat memory that is cut as `cut` says.
        cut: The cut.
        factors: (layers,), of the type of `flat`.
    """
    own = factors.index_select(0, cut.owners)
    start = 0
    for first, end, count in cut.chunks:
        factor = (
            own[first]
            if end == first + 1
            else own[first:end].repeat_interleave(cut.repeats[first:end], output_size=count)
        )
        flat.narrow(0, start, count).mul_(factor)
        start += count
