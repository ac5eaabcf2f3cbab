"""Bytes that one rank hands to collectives in one optimizer step, counted as DeepSpeed 0.19 issues them.

Its ZeRO 1 and 2 reduce with all-reduces of whole buckets, not with reduce-scatters: stage 2 sends after every micro
batch what stage 1 sends once a step. ZeRO-3 gathers a parameter once a micro batch where its backward pass is within
`stage3_max_reuse_distance`, twice where it is not; small parameters once a step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from scalekd_ds.config import RunConfig
from scalekd_ds.plan.measure import Measured
from scalekd_ds.plan.memory import FLOAT, Layout, comm_bytes, held, padded, persistent

Operation = Literal["all_reduce", "all_gather", "reduce_scatter", "host_to_device"]


@dataclass(frozen=True)
class Collective:
    """One kind of transfer in an optimizer step.

    Attributes:
        what: What is sent.
        operation: How; `host_to_device` is a copy over PCIe, not a collective.
        bytes: Of the whole tensor: what is reduced, or what all ranks together hold after a gather; sum over the step.
        messages: Calls in the step, roughly: for latency.
        behind_compute: It may run beside forward and backward.
    """

    what: str
    operation: Operation
    bytes: int
    messages: int
    behind_compute: bool

    def wire(self, world_size: int) -> float:
        """Bytes that one rank sends, with ring algorithms."""
        if self.operation == "host_to_device":
            return float(self.bytes)
        share = (world_size - 1) / world_size
        return self.bytes * share * (2 if self.operation == "all_reduce" else 1)


def collectives(measured: Measured, cfg: RunConfig, layout: Layout, accumulation: int) -> list[Collective]:
    """What one optimizer step of `accumulation` micro batches sends; scalars (norms, flags, logged losses) left out."""
    if layout.world_size == 1:
        return [c for c in _teacher(measured, layout, accumulation) if c.operation == "host_to_device"]
    sent = _student(measured, layout, accumulation) + _teacher(measured, layout, accumulation)
    if cfg.optim.name == "lamb" and layout.stage:
        norms = 2 * 8 * len(measured.layers)
        # ZeRO-3 steps one sub-group after the other
        sent.append(Collective("LAMB's layer norms", "all_reduce", norms, len(measured.groups), False))
    return sent


def _student(measured: Measured, layout: Layout, accumulation: int) -> list[Collective]:
    stage, w, overlap = layout.stage, layout.world_size, bool(layout.zero.overlap_comm)
    bucket, layers = layout.zero.reduce_bucket_size, measured.layers

    def buckets(elements: float) -> int:
        return max(1, math.ceil(elements / bucket))

    if stage == 0:
        return [Collective("gradients", "all_reduce", FLOAT * measured.numel, buckets(measured.numel), False)]
    if stage < 3:
        times = accumulation if stage == 2 else 1
        gradients = sum(comm_bytes(layer) * layer.numel for layer in layers)
        aligned = sum(padded(measured, w))
        return [
            Collective("gradients", "all_reduce", times * gradients, times * buckets(measured.numel), overlap),
            Collective("updated weights", "all_gather", FLOAT * aligned, len(measured.groups), False),
        ]
    large = [layer for layer in layers if not persistent(layer, layout)]
    small = [layer for layer in layers if persistent(layer, layout)]
    # a layer with x elements behind it meets 2 x of them before its backward pass; further than the JSON's distance, it is
    # gathered anew (less often where prefetching finds it still there)
    elements = sum(layer.numel for layer in large)
    passes = 2.0 - min(1.0, layout.zero.max_reuse_distance / (2 * elements)) if large else 1.0
    gathers = accumulation * passes

    def whole(some: list) -> int:
        return sum(comm_bytes(layer) * held(layer, w) * w for layer in some)

    return [
        Collective("weights", "all_gather", round(gathers * whole(large)), round(gathers * len(large)), overlap),
        Collective("small weights", "all_gather", FLOAT * sum(held(layer, w) * w for layer in small), 1, False),
        Collective("gradients", "reduce_scatter", accumulation * whole(layers), accumulation, overlap),
    ]


def _teacher(measured: Measured, layout: Layout, accumulation: int) -> list[Collective]:
    """The teacher's weights for the targets, and those of its last stage for TPP's forward and backward passes."""
    teacher = measured.teacher
    if layout.placement == "replica" or not teacher.parameters:
        return []
    once = accumulation * (teacher.bytes - teacher.kept_whole + 2 * teacher.last_stage)
    blocks = max(1, round(once / teacher.block))
    sent = [Collective("teacher", "all_gather", once, blocks, True)]
    if layout.placement == "offload":
        # each rank takes its share to its device, and all gather there
        sent.append(Collective("teacher's shares", "host_to_device", once // layout.world_size, blocks, True))
    return sent
