"""Builds the parameter groups and the optimizer of a run."""

from __future__ import annotations

import torch
from torch import nn

from scalekd_ds.config import OptimConfig
from scalekd_ds.optim.lamb import Lamb

# endings of the names that the published Mixer recipes exempt from decay
_EMBEDDINGS = ("pos_embed", "cls_token")
# endings of the names of position embeddings, tokens and the projectors' learned queries
_NO_DECAY = (*_EMBEDDINGS, "relative_position_bias_table", "reg_token", "dist_token", "query.weight")


def _no_decay_names(module: nn.Module) -> set[str]:
    """Names of parameters that the models in `module` exempt from decay by timm's `no_weight_decay()`."""
    names = set()
    for prefix, child in module.named_modules():
        if hasattr(child, "no_weight_decay"):
            names |= {f"{prefix}.{name}" if prefix else name for name in child.no_weight_decay()}
    return names


def param_groups(module: nn.Module, cfg: OptimConfig) -> list[dict]:
    """The trainable parameters in a group with and one without weight decay; an empty group is left out.

    `cfg.no_decay` chooses the parameters without decay, as the published settings do. `1d` (AdamW on transformers and
    ConvNeXt): those of one dimension, embeddings, tokens, learned queries, and what a model names in timm's
    `no_weight_decay()`. `embeddings` (the Mixers): position embeddings and class tokens. `none` (SGD and LAMB): no
    parameter.
    """
    model_names = _no_decay_names(module)
    groups: dict[str, list[nn.Parameter]] = {"decay": [], "no_decay": []}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        exempt = {
            "1d": parameter.ndim <= 1 or name.endswith(_NO_DECAY) or name in model_names,
            "embeddings": name.endswith(_EMBEDDINGS),
            "none": False,
        }
        groups["no_decay" if exempt[cfg.no_decay] else "decay"].append(parameter)
    decay = {"decay": cfg.weight_decay, "no_decay": 0.0}
    return [{"params": p, "weight_decay": decay[name]} for name, p in groups.items() if p]


def build_optimizer(module: nn.Module, cfg: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer `cfg.name`: SGD with momentum, AdamW, or a LAMB that is correct under every ZeRO stage."""
    groups = param_groups(module, cfg)
    # one pass over each tensor where the others make one for each operation: 3 times as fast on a CPU
    if cfg.name == "sgd":
        return torch.optim.SGD(groups, lr=cfg.lr, momentum=cfg.momentum, fused=True)
    if cfg.name == "adamw":
        return torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=True)
    return Lamb(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps)
