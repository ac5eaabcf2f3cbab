"""What the model of a step takes for granted, apart from it: the command line lists it without importing torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from scalekd_ds.errors import UserError

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
