"""The throughput model: seconds of an optimizer step, from FLOP, bytes and the fields of `Assumptions`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from scalekd_ds.config import RunConfig
from scalekd_ds.plan.assumptions import Assumptions
from scalekd_ds.plan.communication import Collective
from scalekd_ds.plan.measure import Measured
from scalekd_ds.plan.memory import FLOAT, MOMENTS, Layout


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step by part; `total` is their sum.

    Attributes:
        teacher: The teacher's targets.
        student: Forward and backward passes of student and projectors.
        waiting: Waiting for the slowest rank.
        optimizer: The update of this rank's share of the parameters.
        communication: Communication that does not hide behind computation.
        reading: Waiting for a teacher cache, which is read beside all of that; 0 without one.
    """

    teacher: float
    student: float
    waiting: float
    optimizer: float
    communication: float
    reading: float = 0.0

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return self.teacher + self.student + self.waiting + self.optimizer + self.communication + self.reading


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
    """Seconds of an optimizer step: FLOP over the assumed rate, bytes over bandwidths, and waiting for the slowest rank.

    Args:
        measured: The measurements of the run.
        cfg: The run.
        layout: ZeRO stage, number of ranks and teacher placement.
        sent: The transfers of the step, from `collectives`.
        micro_batch: Images in a forward pass.
        accumulation: Micro batches in a step.
        assume: The assumptions.
        nodes_of: GPUs in a node.
    """
    w, utilisation = layout.world_size, micro_batch / (micro_batch + assume.half_batch)
    rate = assume.peak_tflops * 1e12 * assume.mfu * utilisation
    teacher = accumulation * measured.teacher_flop(micro_batch) / rate
    student = accumulation * measured.student_flop(micro_batch) / rate
    # the expected largest of W normal deviates, to first order
    waiting = (teacher + student) * assume.jitter * math.sqrt(2.0 * math.log(w)) if w > 1 else 0.0
    updated = measured.numel / (w if layout.stage else 1)
    # the update reads weights, gradient and each moment, and writes all but the gradient
    optimizer_bytes = FLOAT * updated * (3 + 2 * MOMENTS[cfg.optim.name])
    behind_compute = exposed = 0.0
    for transfer in sent:
        seconds = _seconds(transfer, w, assume, nodes_of)
        if transfer.behind_compute:
            behind_compute += seconds
        else:
            exposed += seconds
    # at most as much as there is computation to hide behind
    hidden = min(assume.overlap * behind_compute, teacher + student)
    optimizer = optimizer_bytes / (assume.memory_gb_s * 1e9)
    step = StepTime(teacher, student, waiting, optimizer, exposed + behind_compute - hidden)
    # the ranks of a node share its disk
    read = measured.read * micro_batch * accumulation * min(w, nodes_of) / (assume.disk_gb_s * 1e9)
    return replace(step, reading=max(0.0, read - step.total))


def _seconds(transfer: Collective, world_size: int, assume: Assumptions, nodes_of: int) -> float:
    """Seconds of one kind of transfer, all its calls in a step together."""
    if transfer.operation == "host_to_device":
        bandwidth = assume.host_gb_s
    else:
        # a ring crosses from each node to the next once, so with all rings together a node sends what one rank sends
        bandwidth = assume.intra_gb_s if world_size <= nodes_of else min(assume.intra_gb_s, assume.inter_gb_s)
    latency = transfer.messages * assume.latency_us * 1e-6 * math.ceil(math.log2(max(2, world_size)))
    return transfer.wire(world_size) / (bandwidth * 1e9) + latency
