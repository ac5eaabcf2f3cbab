"""The assumptions of the throughput model, in a module that does not import torch, for the help of `scalekd plan`."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from scalekd_ds.errors import UserError

_MAY_BE_ZERO = ("half_batch", "latency_us", "overlap", "jitter", "reserve_gib", "dali_gib", "fragmentation")


@dataclass(frozen=True)
class Assumptions:
    """What the throughput model assumes; none of it was measured on the cluster that is planned for.

    Attributes:
        peak_tflops: Rate of a GPU's dense matrix products in 16 bits, in 10^12 FLOP/s (A100: 312, H100: 989).
        mfu: Share of that rate that forward and backward passes reach with large micro batches.
        half_batch: Images in a micro batch with which half of `mfu` is reached, since small ones do not fill a GPU.
        memory_gb_s: A GPU's memory bandwidth, which limits the optimizer, in 10^9 bytes/s.
        intra_gb_s: Bandwidth of one rank within a node (NVLink), in 10^9 bytes/s.
        inter_gb_s: Bandwidth of a node to other nodes, all its network cards together, in 10^9 bytes/s.
        disk_gb_s: Bandwidth with which a node reads or writes a teacher cache, in 10^9 bytes/s.
        host_gb_s: Bandwidth from host to GPU (PCIe) for each GPU, in 10^9 bytes/s.
        latency_us: Latency of a collective for each level of its tree, in microseconds.
        overlap: Share of the communication beside computation that hides behind it.
        jitter: Standard deviation of a rank's computation time, as a share of it; all ranks wait for the slowest.
        reserve_gib: GPU memory of the CUDA context, NCCL and workspaces of libraries, in GiB.
        dali_gib: GPU memory of DALI's decoder, in GiB.
        fragmentation: Share of GPU memory that the allocator cannot use.
        host_memory_gib: Memory of a node, which limits an offloaded teacher, in GiB.
    """

    peak_tflops: float = 312.0
    mfu: float = 0.35
    half_batch: float = 4.0
    memory_gb_s: float = 1500.0
    intra_gb_s: float = 200.0
    inter_gb_s: float = 50.0
    disk_gb_s: float = 2.0
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
