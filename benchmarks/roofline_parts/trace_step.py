"""Traces a step, eager and fused, and prints both as JSON; a process of `fake_cuda.environment`."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import fake_cuda
import pairs
import torch

from roofline_parts.fused import Fused
from roofline_parts.fused_step import fuse_step
from roofline_parts.step import build, own_operators, trace_step
from roofline_parts.trace import Trace
from scalekd_ds.engine.processes import start_processes

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def find(
    pair: str | None, recipe: str | None, batch: int, dtype: str, teacher_precision: str, fuse: bool
) -> dict[str, Any]:
    """Both traces of a step.

    Returns:
        `eager` and `fused`: lists of kernels, the second one None where it is not asked for; `update` and `update_bytes`: as
        `step.trace_step` has them; `launches`: as `fake_cuda.Watch` counts them by part; `seconds` of both traces.
    """
    cfg, begin = pairs.config_of(pair, recipe), time.perf_counter()
    distiller = build(cfg, DTYPES[dtype], teacher_precision)
    with fake_cuda.tensors():
        with fake_cuda.Watch():
            fake_cuda.materialise(torch.device("cuda", 0), distiller, distiller.teacher)
        trace, on_kernels, update = trace_step(cfg, distiller, batch, DTYPES[dtype])
        seconds = {"eager": time.perf_counter() - begin}
        kernels = None
        if fuse:
            begin = time.perf_counter()
            kernels = fuse_step(Fused(trace.scores, lambda: own_operators(Trace())), distiller, batch, DTYPES[dtype])
            seconds["fused"] = time.perf_counter() - begin
    return {
        "eager": trace.kernels,
        "fused": kernels,
        "update": on_kernels,
        "update_bytes": update,
        "launches": dict(trace.launches),
        "trace_seconds": seconds,
    }


def main() -> None:
    start_processes()
    fake_cuda.pretend()
    print(json.dumps(find(**json.loads(sys.argv[1]))), flush=True)


if __name__ == "__main__":
    main()
