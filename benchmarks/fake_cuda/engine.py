"""What surrounds a step of the trainer where DeepSpeed's engine, which would want a real device, is left out."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from scalekd_ds.distiller import ScaleKD


class Engine:
    """What the step asks of DeepSpeed's engine, without ZeRO."""

    def __init__(self, module: ScaleKD, optimizer: Any, dtype: torch.dtype | None, accumulation: int) -> None:
        self.module, self.optimizer, self.dtype, self.accumulation = module, optimizer, dtype, accumulation
        self.device, self.micro = next(module.parameters()).device, 0

    def __call__(self, *args: Any) -> dict[str, torch.Tensor]:
        with torch.autocast("cuda", self.dtype) if self.dtype else contextlib.nullcontext():
            return self.module(*args)

    def gradient_accumulation_steps(self) -> int:
        return self.accumulation

    def is_gradient_accumulation_boundary(self) -> bool:
        return (self.micro + 1) % self.accumulation == 0

    def zero_optimization_stage(self) -> int:
        return 0

    def was_step_applied(self) -> bool:
        return not self.optimizer.overflow

    def backward(self, loss: torch.Tensor) -> None:
        (loss / self.accumulation).backward()

    def step(self) -> None:
        if self.is_gradient_accumulation_boundary():
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.micro += 1


def make_state(distiller: ScaleKD, optimizer: Any, ema: Any) -> None:
    """Makes what the first step makes and later ones find: the optimizer's moments, and the average."""
    for parameter in distiller.parameters():
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    ema.update()
