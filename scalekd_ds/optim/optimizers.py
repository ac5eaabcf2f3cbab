"""Parameter groups, optimizers, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from scalekd_ds.config import OptimConfig, ScheduleConfig
from scalekd_ds.optim.lamb import Lamb

# the names that the published Mixer recipes list, and nothing else beside them
_EMBEDDINGS = ("pos_embed", "cls_token")
# position embeddings, tokens and the projectors' learned queries
_NO_DECAY = (*_EMBEDDINGS, "relative_position_bias_table", "reg_token", "dist_token", "query.weight")


def _no_decay_names(module: nn.Module) -> set[str]:
    """Names that models below `module` ask for by timm's `no_weight_decay()`."""
    names = set()
    for prefix, child in module.named_modules():
        if hasattr(child, "no_weight_decay"):
            names |= {f"{prefix}.{name}" if prefix else name for name in child.no_weight_decay()}
    return names


def param_groups(module: nn.Module, cfg: OptimConfig) -> list[dict]:
    """Groups with and without weight decay, in the module's order; none is empty.

    What has no decay is `cfg.no_decay`'s choice, the three that the published settings have: `1d` (AdamW on transformers
    and ConvNeXt) also takes what a model asks for by timm's `no_weight_decay()`, `embeddings` (the Mixers) position
    embeddings and class tokens by name, `none` (SGD and LAMB) nothing.
    """
    asked = _no_decay_names(module)
    groups: dict[str, list[nn.Parameter]] = {"decay": [], "no_decay": []}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        exempt = {
            "1d": parameter.ndim <= 1 or name.endswith(_NO_DECAY) or name in asked,
            "embeddings": name.endswith(_EMBEDDINGS),
            "none": False,
        }
        groups["no_decay" if exempt[cfg.no_decay] else "decay"].append(parameter)
    decay = {"decay": cfg.weight_decay, "no_decay": 0.0}
    return [{"params": p, "weight_decay": decay[name]} for name, p in groups.items() if p]


def build_optimizer(module: nn.Module, cfg: OptimConfig) -> torch.optim.Optimizer:
    """SGD with momentum, AdamW, or a LAMB that is right under every ZeRO stage."""
    groups = param_groups(module, cfg)
    if cfg.name == "sgd":
        return torch.optim.SGD(groups, lr=cfg.lr, momentum=cfg.momentum)
    if cfg.name == "adamw":
        return torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps)
    return Lamb(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps)


def learning_rate_factor(step: int, cfg: ScheduleConfig, steps_per_epoch: float, total_steps: int, lr: float) -> float:
    """Learning rate at optimizer step `step` (counted from 0), as a share of `lr`.

    Warm-up is linear from `warmup_factor` at step 0. Cosine runs from the end of warm-up to `min_lr` at `total_steps`;
    multistep multiplies by `gamma` from each milestone on.
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
    optimizer: torch.optim.Optimizer, cfg: ScheduleConfig, steps_per_epoch: float, total_steps: int, lr: float
) -> torch.optim.lr_scheduler.LambdaLR:
    """`learning_rate_factor` as a scheduler that DeepSpeed steps and saves."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, cfg, steps_per_epoch, total_steps, lr)
    )
