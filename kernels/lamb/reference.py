"""LAMB as it is written down: the specification of the kernels, one layer after the other in plain PyTorch."""

from __future__ import annotations

import torch


def adam_direction(
    weight: torch.Tensor,
    grad: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    step: int,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> torch.Tensor:
    """Advances a layer's moments in place, and returns its update u (You et al., 2020, algorithm 2) before the trust ratio.

    Args:
        weight: The layer's weights, of any shape.
        grad: Their gradient.
        first: First moment.
        second: Second moment.
        step: Number of this step, from 1.
        betas: Decay rates of the moments.
        eps: Term added to the root of the second moment.
        weight_decay: Factor of the decay term weight_decay * w.
    """
    beta1, beta2 = betas
    first += (1 - beta1) * (grad - first)
    second += (1 - beta2) * (grad.square() - second)
    update = first / (1 - beta1**step) / ((second / (1 - beta2**step)).sqrt() + eps)
    return update + weight_decay * weight


def trust_ratio(weight_norm: torch.Tensor, update_norm: torch.Tensor) -> torch.Tensor:
    """|w| / |u| of whole layers, 1 where either is 0."""
    return torch.where(weight_norm * update_norm == 0, 1.0, weight_norm / update_norm)


def lamb_layer(
    weight: torch.Tensor,
    grad: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """A step of a whole layer, in place; arguments as in `adam_direction`. Without weight decay there is no trust ratio."""
    update = adam_direction(weight, grad, first, second, step, betas, eps, weight_decay)
    ratio = trust_ratio(weight.norm(), update.norm()) if weight_decay else 1.0
    weight -= lr * ratio * update
