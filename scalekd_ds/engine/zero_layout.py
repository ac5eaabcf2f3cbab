"""Finds where layers lie in ZeRO's flat shards, which LAMB's norms, the student's moving average and checkpoints need.

It reads private fields of DeepSpeed's ZeRO optimizers, so it checks that every parameter is accounted for. A layer is
one parameter tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Segment:
    """The part of one layer that lies in one flat shard of this rank.

    Attributes:
        layer: Index into `Shard.parameters`.
        start: First element in the flat shard.
        count: Number of elements.
        offset: First element in the flattened layer.
    """

    layer: int
    start: int
    count: int
    offset: int


@dataclass(frozen=True)
class Shard:
    """A flat piece of master weights that this rank updates.

    Attributes:
        flat: The master weights, as the tensor that the optimizer updates.
        parameters: The layers of the parameter group, the same on every rank.
        segments: The parts of them that this rank holds, without padding.
    """

    flat: torch.Tensor
    parameters: Sequence[torch.Tensor]
    segments: list[Segment]


def shards_of(engine: Any) -> list[Shard]:
    """This rank's master weights, at any ZeRO stage.

    Without ZeRO every rank updates all weights: each parameter is then a shard, and its segment is the slice that
    ZeRO-3 would give to this rank.

    Raises:
        RuntimeError: The installed DeepSpeed keeps its shards in other fields than the versions known here.
    """
    # here, so that LAMB without an engine needs no DeepSpeed
    import deepspeed

    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    try:
        shards = {0: _replicated, 3: _stage3}.get(stage, _stage12)(zero if stage else engine.module)
    except AttributeError as error:
        raise RuntimeError(
            f"layers cannot be found in DeepSpeed {deepspeed.__version__}'s ZeRO-{stage} optimizer ({error}): use ZeRO "
            "0, or neither LAMB nor ema.decay, or a DeepSpeed version that the tests cover."
        ) from None
    known = sum(len(shard.parameters) for shard in shards)
    trainable = sum(p.requires_grad for p in engine.module.parameters())
    if known != trainable:
        raise RuntimeError(
            f"{known} layers were found in DeepSpeed {deepspeed.__version__}'s ZeRO-{stage} shards, but the model has "
            f"{trainable}: use a DeepSpeed version that the tests cover."
        )
    return shards


def _slice_of_rank(numel: int, held: int) -> tuple[int, int]:
    """(offset, count) of this rank's slice of a layer that is cut into slices of `held` elements, without padding."""
    from deepspeed import comm as dist

    offset = dist.get_rank() * held
    return offset, min(held, max(0, numel - offset))


def _replicated(module: nn.Module) -> list[Shard]:
    """The shards without ZeRO."""
    from deepspeed import comm as dist

    shards = []
    for parameter in module.parameters():
        if parameter.requires_grad:
            offset, count = _slice_of_rank(parameter.numel(), -(-parameter.numel() // dist.get_world_size()))
            shards.append(Shard(parameter, [parameter], [Segment(0, offset, count, offset)] if count else []))
    return shards


def _stage12(zero: Any) -> list[Shard]:
    """The shards of ZeRO-1 and ZeRO-2, which cut each flattened parameter group into one partition for each rank."""
    from deepspeed import comm as dist

    shards = []
    groups = zip(
        zero.single_partition_of_fp32_groups, zero.round_robin_bit16_groups, zero.round_robin_bit16_offsets, strict=True
    )
    for flat, parameters, places in groups:
        # computed from the places in the group, because DeepSpeed's own _hp_mapping is wrong with round_robin_gradients
        first = dist.get_rank() * flat.numel()
        segments = []
        for layer, (parameter, place) in enumerate(zip(parameters, places, strict=True)):
            start, end = max(place, first), min(place + parameter.numel(), first + flat.numel())
            if start < end:
                segments.append(Segment(layer, start - first, end - start, start - place))
        shards.append(Shard(flat, list(parameters), segments))
    return shards


def _stage3(zero: Any) -> list[Shard]:
    """The shards of ZeRO-3, which cuts each parameter into one slice for each rank."""
    shards = []
    for flat, parameters in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
        segments, start = [], 0
        for layer, parameter in enumerate(parameters):
            held = parameter.partition_numel()
            # the last slices of a layer may end in padding, which is uninitialised memory
            offset, count = _slice_of_rank(parameter.ds_numel, held)
            if count:
                segments.append(Segment(layer, start, count, offset))
            start += held
        shards.append(Shard(flat, list(parameters), segments))
    return shards
