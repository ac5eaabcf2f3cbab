"""Makes the DeepSpeed engine, which holds student and projectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed
import torch

from scalekd_ds.distiller import ScaleKD
from scalekd_ds.engine.device_clipping import clip_on_device
from scalekd_ds.engine.ds_config import stage_of
from scalekd_ds.errors import UserError


def initialize(
    distiller: ScaleKD,
    optimizer: torch.optim.Optimizer,
    schedule: Callable[[torch.optim.Optimizer], Any],
    ds_config: dict[str, Any],
    name: str,
) -> deepspeed.DeepSpeedEngine:
    """Makes one engine for student and projectors, at any ZeRO stage; collective.

    Args:
        distiller: The module, on this rank's device.
        optimizer: Optimizer of the distiller's parameters.
        schedule: Makes the learning rate scheduler from the optimizer in which DeepSpeed wraps `optimizer`.
        ds_config: The DeepSpeed JSON, merged with the recipe.
        name: Name of that JSON, for error messages.

    Raises:
        UserError: DeepSpeed refuses the configuration.
    """
    if stage_of(ds_config) == 3:
        # the student runs by forward_intermediates(), not forward(), so the parameters of its root module (position
        # embeddings, class token) have to be gathered with the distiller's forward
        for parameter in distiller.student.parameters(recurse=False):
            deepspeed.zero.register_external_parameter(distiller, parameter)
        # a pair of projectors reads the parameters of its two views itself, to run both in one pass
        for pair in distiller.projectors.values():
            for parameter in pair.parameters():
                deepspeed.zero.register_external_parameter(pair, parameter)
    try:
        engine, *_ = deepspeed.initialize(model=distiller, optimizer=optimizer, lr_scheduler=schedule, config=ds_config)
    except deepspeed.runtime.config.DeepSpeedConfigError as error:
        raise UserError(f"DeepSpeed refuses {name}: {error}") from None
    if stage_of(ds_config) == 3:
        # while DeepSpeed traces its first pass it releases even the parameters that it is to keep whole, and gathers
        # them again rounded to autocast's 16 bits: the first step of a resumed run would differ from that step without
        # the cut
        for parameter in engine.optimizer.persistent_parameters:
            parameter.is_external_param = True
    clip_on_device(engine)
    _reduce_nothing_alone(engine)
    return engine


def _reduce_nothing_alone(engine: deepspeed.DeepSpeedEngine) -> None:
    """Without ZeRO, spares a single rank the copies of all gradients into one buffer and back, around a sum of one."""
    is_alone = engine.dp_world_size == 1 and engine.zero_optimization_stage() == 0
    # the optimizers that DeepSpeed has for 16-bit weights are told by the reduction where a step ends
    if is_alone and not hasattr(engine.optimizer, "set_gradient_accumulation_boundary"):
        engine.enable_backward_allreduce = False
