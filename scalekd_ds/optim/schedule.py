"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

import torch

from scalekd_ds.config import ScheduleConfig


def learning_rate_factor(
    step: float, cfg: ScheduleConfig, steps_per_epoch: float, total_steps: float, lr: float
) -> float:
    """The learning rate at an optimizer step, as a share of `lr`.

    Warm-up is linear from `warmup_factor` at step 0. The cosine runs from the end of warm-up to `min_lr` at
    `total_steps`; multistep multiplies by `gamma` at each milestone.

    Args:
        step: Optimizer step, counted from 0.
        cfg: Kind of schedule, and its epochs and factors.
        steps_per_epoch: Optimizer steps in an epoch, which may be fractional.
        total_steps: Optimizer steps of the run.
        lr: Base learning rate.
    """
    warmup = cfg.warmup_epochs * steps_per_epoch
    if step < warmup:
        return cfg.warmup_factor + (1.0 - cfg.warmup_factor) * step / warmup
    if cfg.name == "constant":
        return 1.0
    if cfg.name == "multistep":
        return cfg.gamma ** sum(step >= m * steps_per_epoch for m in cfg.milestones)
    progress = min(1.0, (step - warmup) / max(1.0, total_steps - warmup))
    floor = cfg.min_lr / lr
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def build_schedule(
    optimizer: torch.optim.Optimizer,
    cfg: ScheduleConfig,
    steps_per_epoch: float,
    total_steps: int,
    lr: float,
    steps_before: float = 0.0,
) -> torch.optim.lr_scheduler.LambdaLR:
    """A torch scheduler of `learning_rate_factor`, which DeepSpeed steps.

    Args:
        optimizer: The optimizer whose learning rates it sets.
        cfg: As in `learning_rate_factor`, like the three that follow.
        steps_per_epoch: Optimizer steps in an epoch, which may be fractional.
        total_steps: Optimizer steps of the run.
        lr: Peak learning rate.
        steps_before: Steps by which the run is ahead of their count, since earlier ones had another global batch.
    """
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        # torch asks for step 0 before the checkpoint's is loaded
        lambda step: learning_rate_factor(
            max(0.0, step + steps_before), cfg, steps_per_epoch, total_steps + steps_before, lr
        ),
    )
