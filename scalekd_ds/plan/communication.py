"""Bytes that one rank passes to collectives in one optimizer step, as DeepSpeed 0.19 calls them.

ZeRO 1 and 2 reduce gradients by all-reduces of whole buckets, not by reduce-scatters: stage 1 once in a step, stage 2 after
every micro batch. ZeRO-3 gathers a parameter once in a micro batch if its backward pass is within
`stage3_max_reuse_distance`, and else twice; it gathers small parameters once in a step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from scalekd_ds.config import RunConfig
from scalekd_ds.plan.measure import Measured, TrainableParameter
from scalekd_ds.plan.memory import FLOAT, Layout, is_persistent, padded_group_numels, sent_element_bytes, shard_numel

Operation = Literal["all_reduce", "all_gather", "reduce_scatter", "host_to_device"]


@dataclass(frozen=True)
class Collective:
    """One kind of transfer in an optimizer step.

    Attributes:
        what: What is sent.
        operation: How it is sent; `host_to_device` is a copy over PCIe, not a collective.
        bytes: Bytes of the whole tensor, before a reduction or after a gather; the sum over the step.
        messages: Approximate number of calls in the step, for their latency.
        behind_compute: Whether it can run beside forward and backward passes.
    """

    what: str
    operation: Operation
    bytes: int
    messages: int
    behind_compute: bool

    def wire(self, world_size: int) -> float:
        """Bytes that one rank sends in the step, by ring algorithms."""
        if self.operation == "host_to_device":
            return float(self.bytes)
        share = (world_size - 1) / world_size
        return self.bytes * share * (2 if self.operation == "all_reduce" else 1)


def collectives(measured: Measured, cfg: RunConfig, layout: Layout, accumulation: int) -> list[Collective]:
    """The transfers of one optimizer step, without scalars (norms, flags, logged losses).

    Args:
        measured: The measurements of the run.
        cfg: The run.
        layout: ZeRO stage, number of ranks and teacher placement.
        accumulation: Micro batches in the step.
    """
    if layout.world_size == 1:
        return teacher_transfers(measured, layout, accumulation)
    sent = _student_transfers(measured, layout, accumulation) + teacher_transfers(measured, layout, accumulation)
    if cfg.optim.name == "lamb" and layout.stage:
        norms = 2 * 8 * len(measured.parameters)
        # ZeRO-3 steps one sub-group after the other
        sent.append(Collective("LAMB's layer norms", "all_reduce", norms, len(measured.groups), False))
    return sent


def _student_transfers(measured: Measured, layout: Layout, accumulation: int) -> list[Collective]:
    """The gradients and weights of student and projectors."""
    stage, w, overlap = layout.stage, layout.world_size, bool(layout.zero.overlap_comm)
    bucket, parameters = layout.zero.reduce_bucket_size, measured.parameters

    def num_buckets(elements: float) -> int:
        return max(1, math.ceil(elements / bucket))

    if stage == 0:
        return [Collective("gradients", "all_reduce", FLOAT * measured.numel, num_buckets(measured.numel), False)]
    if stage < 3:
        times = accumulation if stage == 2 else 1
        gradients = sum(sent_element_bytes(p) * p.numel for p in parameters)
        padded = sum(padded_group_numels(measured, w))
        return [
            Collective("gradients", "all_reduce", times * gradients, times * num_buckets(measured.numel), overlap),
            Collective("updated weights", "all_gather", FLOAT * padded, len(measured.groups), False),
        ]
    large = [p for p in parameters if not is_persistent(p, layout)]
    small = [p for p in parameters if is_persistent(p, layout)]
    # between the forward and the backward pass of a parameter with x elements after it lie 2 x elements; if these are more
    # than the JSON's distance, it is gathered again (less often where prefetching finds it still in memory)
    elements = sum(p.numel for p in large)
    passes = 2.0 - min(1.0, layout.zero.max_reuse_distance / (2 * elements)) if large else 1.0
    gathers = accumulation * passes

    def gathered_bytes(some: list[TrainableParameter]) -> int:
        return sum(sent_element_bytes(p) * shard_numel(p, w) * w for p in some)

    return [
        Collective(
            "weights", "all_gather", round(gathers * gathered_bytes(large)), round(gathers * len(large)), overlap
        ),
        Collective("small weights", "all_gather", FLOAT * sum(shard_numel(p, w) * w for p in small), 1, False),
        Collective("gradients", "reduce_scatter", accumulation * gathered_bytes(parameters), accumulation, overlap),
    ]


def teacher_transfers(measured: Measured, layout: Layout, accumulation: int) -> list[Collective]:
    """The teacher's weights: all of them for the targets, and the last stage again for TPP's forward and backward passes.

    With a teacher cache nothing is gathered for the targets.
    """
    teacher = measured.teacher
    if layout.placement == "replica" or not teacher.parameters:
        return []
    for_targets = teacher.bytes - teacher.kept_whole if teacher.gives_targets else 0
    gathered = accumulation * (for_targets + 2 * teacher.last_stage)
    blocks = max(1, round(gathered / teacher.block))
    sent = [Collective("teacher", "all_gather", gathered, blocks, True)] if layout.world_size > 1 else []
    if layout.placement == "offload":
        # each rank copies its share to its GPU, where all ranks gather
        sent.append(Collective("teacher's shares", "host_to_device", gathered // layout.world_size, blocks, True))
    return sent
