"""What one plain optimizer step of a real engine asks of the host, at each ZeRO stage, with each optimizer. Prints JSON.

On a GPU each operator that hands a value to the host waits for all work before it, and so does a tensor that is made of a
Python number; here both are seen as operators. DeepSpeed's calls of `synchronize` are counted too.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import traceback
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from ranks import begin, loss_of, share_of, tell
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scalekd_ds.config import OptimConfig, RunConfig, ScheduleConfig
from scalekd_ds.engine import ds_config
from scalekd_ds.engine import initialize as initialize_module
from scalekd_ds.optim import lamb
from scalekd_ds.optim.optimizers import build_optimizer
from scalekd_ds.optim.schedule import build_schedule
from scalekd_ds.training.ema import StudentEma
from scalekd_ds.training.nonfinite import NonfiniteGuard, skip_nonfinite, unsharded_grad_norm

# they hand a value, or a number of values, to the host
WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2")
# a tensor of Python numbers, which another device would get by a copy that the host waits for
FROM_HOST = "lift_fresh"


class Student(nn.Module):
    """A norm with buffers, and weights in both groups of an optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(13, 37), nn.BatchNorm1d(37), nn.Linear(37, 11)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.relu(self.norm(self.fc1(x))))


class Pair(nn.Module):
    """What an engine holds: a student and its projectors."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student, self.projectors = Student(), nn.ModuleDict()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.student(x)


class Waits(TorchDispatchMode):
    """Collects operators that would make the host wait, as (operator, file of the caller)."""

    def __init__(self, counters: set[int]) -> None:
        super().__init__()
        self.found, self.counters = [], counters

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        masked = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        # an optimizer's number of steps is on the CPU on every device
        own = any(id(t) in self.counters for t in tree_leaves(args) if isinstance(t, torch.Tensor))
        if (name in WAITING or name == FROM_HOST or masked) and not own:
            self.found.append(f"{name} in {caller()}")
        return func(*args, **(kwargs or {}))


def caller() -> str:
    """File and function outside torch that the operator was called from."""
    for frame in reversed(traceback.extract_stack()[:-2]):
        if "/torch/" not in frame.filename and frame.filename != __file__:
            file = frame.filename.replace("\\", "/")
            package = next((p for p in ("deepspeed", "scalekd_ds") if f"/{p}/" in file), "")
            return f"{package}/{Path(file).name} {frame.name}"
    return "torch"


@contextmanager
def counted_synchronize(found: list[str]):
    """DeepSpeed's waits for the whole device, which do nothing on a CPU."""
    accelerator = get_accelerator()
    own = accelerator.synchronize
    accelerator.synchronize = lambda *args, **kwargs: found.append(f"synchronize in {caller()}")
    try:
        yield
    finally:
        accelerator.synchronize = own


def engine_of(optim: OptimConfig, name: str):
    """An engine as a run has it."""
    cfg = dataclasses.replace(RunConfig(optim=optim), global_batch_size=8, micro_batch_size=8)
    merged = ds_config.merge(ds_config.read(name), cfg, torch.distributed.get_world_size())
    pair = Pair()
    optimizer = build_optimizer(pair, optim)
    engine = initialize_module.initialize(
        pair,
        optimizer,
        lambda wrapped: build_schedule(wrapped, ScheduleConfig(), 10, 100, optim.lr),
        merged,
        name,
    )
    if optim.name == "lamb":
        lamb.attach(optimizer, engine)
    skip_nonfinite(engine)
    return engine, optimizer


def waits_of_a_step(optim: OptimConfig, name: str, is_patched: bool = True) -> tuple[list[str], list[float], int]:
    """What the fourth step waits for, the weights after it, and the buckets of gradients that were copied and reduced."""
    own = initialize_module.clip_on_device
    if not is_patched:
        initialize_module.clip_on_device = lambda engine: None
    engine, optimizer = engine_of(optim, name)
    initialize_module.clip_on_device = own
    buckets: list[Any] = []
    own_reduce = engine.allreduce_bucket
    engine.allreduce_bucket = lambda bucket, *args, **more: buckets.append(bucket) or own_reduce(bucket, *args, **more)
    ema = StudentEma(engine, engine.module.student, 0.9)
    guard = NonfiniteGuard(engine.module, Path(tempfile.gettempdir()), 3)
    generator = torch.Generator().manual_seed(1)
    found: list[str] = []
    for step in range(4):
        x, y = torch.randn(8, 13, generator=generator), torch.randn(8, 11, generator=generator)
        counters = {id(value) for state in optimizer.state.values() for key, value in state.items() if key == "step"}
        with Waits(counters) as waits, counted_synchronize(waits.found):
            engine.backward(loss_of(engine(share_of(x)), share_of(y)))
            norm = unsharded_grad_norm(engine)
            engine.step()
            ema.update()
            guard.step_done(engine.was_step_applied(), dict)
        assert engine.was_step_applied()
        if step == 3:
            found = waits.found
    norm = float(engine.get_global_grad_norm() if norm is None else norm)
    parameters = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters):
        weights = torch.cat([p.detach().flatten() for p in parameters]).tolist()
    engine.destroy()
    return found, [*weights, norm], len(buckets)


def main() -> None:
    begin()
    results = {}
    for stage in ("zero0", "zero1", "zero2", "zero3"):
        for name in ("sgd", "adamw", "lamb"):
            for clip in (0.0, 0.05):
                optim = OptimConfig(name, lr=0.01, weight_decay=0.1, clip=clip)
                found, ours, buckets = waits_of_a_step(optim, stage)
                case = {"waits": found, "buckets": buckets}
                if name == "sgd":
                    plain, theirs, _ = waits_of_a_step(optim, stage, is_patched=False)
                    case |= {"of DeepSpeed": len(plain)}
                    case |= {"difference": max(abs(a - b) for a, b in zip(ours, theirs, strict=True))}
                results[f"{stage} {name} clip {clip:g}"] = case
    tell(results)


if __name__ == "__main__":
    sys.exit(main())
