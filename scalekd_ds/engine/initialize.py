"""The one DeepSpeed engine, which holds student and projectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed
import torch

from scalekd_ds.distiller import ScaleKD
from scalekd_ds.engine.ds_config import stage_of
from scalekd_ds.errors import UserError


def initialize(
    distiller: ScaleKD,
    optimizer: torch.optim.Optimizer,
    schedule: Callable[[torch.optim.Optimizer], Any],
    ds_config: dict[str, Any],
    name: str,
) -> deepspeed.DeepSpeedEngine:
    """One engine for student and projectors, from any ZeRO stage.

    Args:
        distiller: On this rank's device.
        optimizer: Over the distiller's parameters.
        schedule: Makes the learning rate's scheduler from the optimizer that DeepSpeed wraps around this one.
        ds_config: The DeepSpeed JSON, merged with the recipe.
        name: Of that JSON, for messages.

    Raises:
        UserError: DeepSpeed refuses the configuration.
    """
    if stage_of(ds_config) == 3:
        # the student runs by forward_intermediates(), not forward(), so what its root module owns itself (position
        # embeddings, class token) has to be fetched with the distiller's forward
        for parameter in distiller.student.parameters(recurse=False):
            deepspeed.zero.register_external_parameter(distiller, parameter)
        # a pair reads its views' parameters itself, so that both run in one pass
        for pair in distiller.projectors.values():
            for parameter in pair.parameters():
                deepspeed.zero.register_external_parameter(pair, parameter)
    try:
        engine, *_ = deepspeed.initialize(model=distiller, optimizer=optimizer, lr_scheduler=schedule, config=ds_config)
    except deepspeed.runtime.config.DeepSpeedConfigError as error:
        raise UserError(f"DeepSpeed refuses {name}: {error}") from None
    if stage_of(ds_config) == 3:
        # While DeepSpeed records its first pass it gives up even what it is to keep whole, and fetches it again rounded to
        # autocast's 16 bits: the first step of a resumed run would differ from the same step of the whole one.
        for parameter in engine.optimizer.persistent_parameters:
            parameter.is_external_param = True
    return engine
