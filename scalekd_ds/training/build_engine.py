"""Builds the DeepSpeed engine of a run from its configuration."""

from __future__ import annotations

import dataclasses
from typing import Any

import deepspeed

from scalekd_ds.config import RunConfig
from scalekd_ds.distiller import ScaleKD
from scalekd_ds.engine.initialize import initialize
from scalekd_ds.optim import lamb
from scalekd_ds.optim.optimizers import build_optimizer
from scalekd_ds.optim.schedule import build_schedule


def build_engine(
    distiller: ScaleKD,
    cfg: RunConfig,
    ds_config: dict[str, Any],
    steps_per_epoch: float,
    total_steps: int,
    steps_before: float = 0.0,
) -> deepspeed.DeepSpeedEngine:
    """Makes one engine for student and projectors, with the recipe's optimizer and schedule; collective.

    Args:
        distiller: The module, on this rank's device.
        cfg: The run.
        ds_config: The DeepSpeed JSON, merged with the recipe.
        steps_per_epoch: Optimizer steps in an epoch, which may be fractional.
        total_steps: Optimizer steps of the run.
        steps_before: As in `build_schedule`.

    Raises:
        UserError: DeepSpeed refuses the configuration.
    """
    lr = cfg.learning_rate
    optimizer = build_optimizer(distiller, dataclasses.replace(cfg.optim, lr=lr))
    engine = initialize(
        distiller,
        optimizer,
        lambda wrapped: build_schedule(wrapped, cfg.schedule, steps_per_epoch, total_steps, lr, steps_before),
        ds_config,
        cfg.run.ds_config,
    )
    if isinstance(optimizer, lamb.Lamb):
        lamb.attach(optimizer, engine)
    return engine
