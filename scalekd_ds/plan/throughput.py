"""Seconds of an optimizer step from a stated model: every assumption is a field that the command line can set."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from scalekd_ds.config import RunConfig
from scalekd_ds.errors import UserError
from scalekd_ds.plan.communication import Collective
from scalekd_ds.plan.measure import Measured
from scalekd_ds.plan.memory import FLOAT, MOMENTS, Layout

_MAY_BE_ZERO = ("half_batch", "latency_us", "overlap", "jitter", "reserve_gib", "dali_gib", "fragmentation")


@dataclass(frozen=True)
class Assumptions:
    """What the model takes for granted; none of it was measured on the cluster that is planned for.

    Attributes:
        peak_tflops: A GPU's dense matmul rate in 16 bits (A100: 312, H100: 989).
        mfu: Share of that rate that forward and backward passes reach on large micro batches.
        half_batch: Images in a micro batch at which half of that is reached: small ones leave a GPU waiting.
        memory_gb_s: A GPU's memory bandwidth, for the optimizer, in 10^9 bytes/s.
        intra_gb_s: What one rank sends within a node (NVLink), in 10^9 bytes/s.
        inter_gb_s: What a node sends to other nodes, all its network cards together, in 10^9 bytes/s.
        host_gb_s: Host to GPU (PCIe), in 10^9 bytes/s for each GPU.
        latency_us: Of a collective, for each level of its tree, in microseconds.
        overlap: Share of what may hide behind computation that does.
        jitter: Standard deviation of a rank's computation from step to step; all wait for the slowest of W.
        reserve_gib: GPU memory that is none of ours: CUDA context, NCCL, libraries' workspaces, in GiB.
        dali_gib: What DALI's decoder takes on a GPU, in GiB.
        fragmentation: Share of GPU memory that the allocator cannot use.
        host_memory_gib: A node's memory, for a teacher that is offloaded, in GiB.
    """

    peak_tflops: float = 312.0
    mfu: float = 0.35
    half_batch: float = 4.0
    memory_gb_s: float = 1500.0
    intra_gb_s: float = 200.0
    inter_gb_s: float = 50.0
    host_gb_s: float = 12.0
    latency_us: float = 15.0
    overlap: float = 0.7
    jitter: float = 0.01
    reserve_gib: float = 1.0
    dali_gib: float = 1.0
    fragmentation: float = 0.05
    host_memory_gib: float = 512.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            above = value >= 0.0 if field.name in _MAY_BE_ZERO else value > 0.0
            below = value < 1.0 if field.name in ("fragmentation", "overlap") else value < math.inf
            if not (above and below):
                need = "not negative" if field.name in _MAY_BE_ZERO else "positive"
                raise UserError(f"assume.{field.name} is {value}: it must be {need}{'' if below else ' and below 1'}.")


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
