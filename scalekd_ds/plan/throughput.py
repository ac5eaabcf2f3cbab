"""Seconds of an optimizer step from a stated model: every assumption is a field that the command line can set."""

from __future__ import annotations

import math
from dataclasses import dataclass

from scalekd_ds.config import RunConfig
from scalekd_ds.plan.assumptions import Assumptions
from scalekd_ds.plan.communication import Collective
from scalekd_ds.plan.measure import Measured
from scalekd_ds.plan.memory import FLOAT, MOMENTS, Layout


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step by part; `total` is their sum.

    Attributes:
        teacher, student: Computation.
        waiting: For the slowest rank.
        optimizer: Update of this rank's share.
        communication: What does not hide behind computation.
    """

    teacher: float
    student: float
    waiting: float
    optimizer: float
    communication: float

    @property
    def total(self) -> float:
        return self.teacher + self.student + self.waiting + self.optimizer + self.communication


def step_time(
    measured: Measured,
    cfg: RunConfig,
    layout: Layout,
    sent: list[Collective],
    micro_batch: int,
    accumulation: int,
    assume: Assumptions,
    nodes_of: int,
) -> StepTime:
    """The model: FLOP over the rate that is assumed, bytes over bandwidths, and the slowest of W normal deviates.

    Args:
        measured: The pair, counted.
        cfg: The run.
        layout: ZeRO stage, ranks, teacher's place.
        sent: `collectives` of the step.
        micro_batch: Images in a forward pass.
        accumulation: Micro batches in a step.
        assume: The assumptions.
        nodes_of: GPUs in a node.
    """
    w, filled = layout.world_size, micro_batch / (micro_batch + assume.half_batch)
    rate = assume.peak_tflops * 1e12 * assume.mfu * filled
    teacher = accumulation * measured.teacher_flop(micro_batch) / rate
    student = accumulation * measured.student_flop(micro_batch) / rate
    # expectation of the largest of W normal deviates, to first order
    waiting = (teacher + student) * assume.jitter * math.sqrt(2.0 * math.log(w)) if w > 1 else 0.0
    updated = measured.numel / (w if layout.stage else 1)
    # weights, gradient and each moment: read, and all but the gradient written
    touched = FLOAT * updated * (3 + 2 * MOMENTS[cfg.optim.name])
    hidden = seen = 0.0
    for transfer in sent:
        seconds = _seconds(transfer, w, assume, nodes_of)
        if transfer.behind_compute:
            hidden += seconds
        else:
            seen += seconds
    # no more can hide than there is computation to hide behind
    hides = min(assume.overlap * hidden, teacher + student)
    return StepTime(teacher, student, waiting, touched / (assume.memory_gb_s * 1e9), seen + hidden - hides)


def _seconds(transfer: Collective, world_size: int, assume: Assumptions, nodes_of: int) -> float:
    if transfer.operation == "host_to_device":
        bandwidth = assume.host_gb_s
    else:
        # as many rings as a node has cards: each crosses to the next node once, so that a node sends what a rank does
        bandwidth = assume.intra_gb_s if world_size <= nodes_of else min(assume.intra_gb_s, assume.inter_gb_s)
    latency = transfer.messages * assume.latency_us * 1e-6 * math.ceil(math.log2(max(2, world_size)))
    return transfer.wire(world_size) / (bandwidth * 1e9) + latency
