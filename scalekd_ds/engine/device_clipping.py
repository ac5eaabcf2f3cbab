"""Keeps norms of gradients and the factor that clips them on the device, where DeepSpeed makes the host wait for them.

DeepSpeed needs the host once in a step: to skip one whose gradients are not finite. Beside that it copies constants to the
device and reads a norm back for every group of parameters, and each of these waits for all work before it. The functions here
replace those of its optimizers and give the same numbers. A DeepSpeed whose functions have other arguments keeps its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from deepspeed import comm as dist


def clip_on_device(engine: Any) -> None:
    """Replaces the functions of an engine that take norms of gradients and clip them; it trains float32 weights."""
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        _replace(engine, "clip_fp32_gradients", lambda: _clip_unsharded(engine))
        return

    def norm(gradients: Iterable[torch.Tensor], params: list, norm_type: float = 2) -> torch.Tensor:
        return _norm_of_shards(zero, stage, gradients, params)

    _replace(zero, "get_grad_norm_direct", norm)
    if stage < 3:

        def clip(grad_groups_flat: list[torch.Tensor], total_norm: torch.Tensor) -> None:
            _clip_shards(zero, grad_groups_flat, total_norm)

        _replace(zero, "unscale_and_clip_grads", clip)


def _replace(owner: Any, name: str, function: Callable) -> None:
    """Sets a method of one object, where it has one with the same arguments."""
    own = getattr(owner, name, None)
    if own is not None and _arguments(own) == _arguments(function):
        setattr(owner, name, function)


def _arguments(function: Callable) -> list[str]:
    """The names of a function's arguments, without `self`; those of the wrapped one where DeepSpeed's profiling wraps it."""
    plain = getattr(function, "__func__", function)
    inner = next((c.cell_contents for c in plain.__closure__ or () if inspect.isfunction(c.cell_contents)), None)
    if plain.__code__.co_flags & inspect.CO_VARARGS and inner is not None:
        plain = inner
    return [name for name in inspect.signature(plain).parameters if name != "self"]


def _norms(gradients: list[torch.Tensor]) -> torch.Tensor:
    """Their norms, float64 as DeepSpeed takes them on CPUs and GPUs."""
    return torch.stack(torch._foreach_norm(gradients, 2, torch.float64))


def _norm_of_shards(zero: Any, stage: int, gradients: Iterable[torch.Tensor], params: list) -> torch.Tensor:
    """The norm of a group's gradients over all ranks, or -1 where it is not finite: 0-dimensional, on the device."""
    found = (g for g in gradients if not getattr(g, "_zero_padding", False))
    # the padding may stand beyond the last parameter
    own = [gradient for _, gradient in zip(params, found, strict=False)]
    total = _norms(own).pow(2).sum() if own else torch.zeros((), device=zero.device)
    if stage == 3:
        group = zero._get_param_partition_group(params[0])
    else:
        group, total = zero.dp_process_group, total.float()
    dist.all_reduce(total, group=group)
    total = total.pow(0.5)
    return total.masked_fill_(total.isfinite().logical_not_(), -1.0)


def _clip_shards(zero: Any, gradients: list[torch.Tensor], norm: torch.Tensor) -> None:
    """Divides gradients, in place, by what makes their norm the one at which ZeRO-1 and ZeRO-2 clip.

    DeepSpeed asks once more whether the norm is finite here, for each group; its `step` skips one whose norm is not.
    """
    if zero.clip_grad == 0.0 and zero.loss_scale == 1.0:
        return
    scale = zero.loss_scale
    if zero.clip_grad > 0.0:
        scale = torch.clamp((norm / zero.loss_scale + 1e-6) / zero.clip_grad, min=1.0) * zero.loss_scale
    for gradient in gradients:
        gradient.mul_(1.0 / scale)


def _clip_unsharded(engine: Any) -> None:
    """Clips the gradients of an engine without ZeRO, in place; collective."""
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    if not gradients:
        return
    norm = torch.stack(torch._foreach_norm(gradients)).pow(2).sum().pow(0.5)
    # the gradients of all ranks are the same, but for what a device rounds otherwise
    norm /= float(dist.get_world_size())
    dist.all_reduce(norm)
    factor = torch.full_like(norm, engine.gradient_clipping()) / (norm + 1e-6)
    torch._foreach_mul_(gradients, factor.clamp_(max=1.0))
