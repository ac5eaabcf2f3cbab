"""One step of the trainer on fake CUDA tensors, traced: the whole of it, eager."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import fake_cuda
import torch
from fake_cuda.engine import Engine, make_state

from roofline_parts.cost import Kernel
from roofline_parts.trace import Trace
from roofline_parts.update import trace_update
from scalekd_ds.build import build_distiller
from scalekd_ds.config import RunConfig
from scalekd_ds.distiller import ScaleKD
from scalekd_ds.kernels.cross_attention import ops as attention
from scalekd_ds.kernels.cross_attention import triton_kernels as attention_kernels
from scalekd_ds.kernels.dual_view import ops as dual_view
from scalekd_ds.kernels.dual_view import triton_kernels as dual_view_kernels
from scalekd_ds.optim.optimizers import build_optimizer
from scalekd_ds.training.ema import start_ema
from scalekd_ds.training.nonfinite import NonfiniteGuard, skip_nonfinite
from scalekd_ds.training.step import train_step

CLASSES = 1000


def build(cfg: RunConfig, dtype: torch.dtype | None, teacher_precision: str) -> ScaleKD:
    """The distiller of a run as the trainer builds it, on the meta device.

    Args:
        cfg: The run.
        dtype: Autocast's, or None.
        teacher_precision: `autocast` or `bf16`, as of `run.teacher_precision`.
    """
    with torch.device("meta"):
        distiller = build_distiller(cfg, CLASSES, verbose=False)
        if dtype is not None and distiller.teacher is not None:
            distiller.teacher.lower_precision(dtype)
        if teacher_precision == "bf16" and distiller.teacher is not None:
            distiller.teacher.hold_in(torch.bfloat16)
        return distiller


@contextmanager
def tapped(distiller: ScaleKD, trace: Trace) -> Iterator[None]:
    """Within, the distiller tells a trace what part it is in; the pass through the teacher's last stage is `TPP`."""
    distiller.time_part, timed = trace.part, distiller.time_part
    teacher: Any = distiller.teacher
    last_stage = teacher.last_stage

    def named(tokens: torch.Tensor) -> torch.Tensor:
        with trace.part("TPP"):
            return last_stage(tokens)

    try:
        with mock.patch.object(teacher, "last_stage", named):
            yield
    finally:
        distiller.time_part = timed


def own_operators(trace: Trace) -> Trace:
    """Has a trace look into our own operators."""
    fake_cuda.run_own_operators(trace, dual_view, dual_view_kernels, "scalekd_ds::dual_view")
    fake_cuda.run_own_operators(trace, attention, attention_kernels, "scalekd_ds::cap_attention")
    return trace


def trace_step(
    cfg: RunConfig, distiller: ScaleKD, batch: int, dtype: torch.dtype | None
) -> tuple[Trace, list[Kernel] | None, int]:
    """Traces a step in which the optimizer and the average have their state; inside of `fake_cuda.tensors`.

    Args:
        cfg: The run.
        distiller: What `build` returns, with fake tensors of the GPU.
        batch: Images.
        dtype: Autocast's, or None.

    Returns:
        The trace, the kernels of the update by `trace_update`, and the bytes of weights, gradients, moments and the average
        that it must move.
    """
    device = next(distiller.parameters()).device
    with fake_cuda.Watch():
        distiller.train()
        optimizer = build_optimizer(distiller, cfg.optim)
        engine = Engine(distiller, optimizer, dtype, 1)
        skip_nonfinite(engine)
        images = torch.empty(batch, 3, *distiller.image_size, device=device)
        labels = torch.empty(batch, dtype=torch.int64, device=device)
        run = SimpleNamespace(
            cfg=cfg,
            distiller=distiller,
            engine=engine,
            teacher=distiller.teacher,
            mixer=None,
            cache=None,
            ema=start_ema(engine, 0.99, None),
            saver=SimpleNamespace(wait_copied=lambda: None),
            nonfinite=NonfiniteGuard(distiller, Path("unused"), 3),
            step=0,
            grad_norm=None,
        )
        make_state(distiller, optimizer, run.ema)
    trace = own_operators(Trace())
    with tapped(distiller, trace), trace:
        train_step(run, iter([(images, labels)]))
    return trace, trace_update(distiller, optimizer, run.ema), update_bytes(distiller, optimizer)


def update_bytes(distiller: ScaleKD, optimizer: Any) -> int:
    """Bytes of an update: each gradient is read; each weight, each moment and the student's average read and written."""
    found = 0
    averaged = {id(p) for p in distiller.student.parameters()}
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        held = [parameter, *(s for s in optimizer.state[parameter].values() if isinstance(s, torch.Tensor) and s.dim())]
        one = parameter.numel() * parameter.element_size()
        found += one + 2 * sum(t.numel() * t.element_size() for t in held) + 2 * one * (id(parameter) in averaged)
    return found
