"""Top-1 and top-5 accuracy over all ranks, with each validation image counted once."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from deepspeed import comm as dist
from torch import nn


def count_correct(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Counts images and correct predictions of a batch.

    Args:
        logits: (B, K).
        labels: (B,) class indices; -1 marks filler, which is not counted.

    Returns:
        (3,) float64: number of images, of those correct at top-1, and of those correct at top-5.
    """
    real = labels >= 0
    top = logits[real].topk(min(5, logits.shape[1]), dim=1).indices == labels[real, None]
    counts = [real.sum(), top[:, 0].sum(), top.any(1).sum()]
    return torch.stack([c.to(torch.float64) for c in counts])


@torch.no_grad()
def evaluate(
    predict: Callable[[torch.Tensor], torch.Tensor], batches: Iterable, device: torch.device
) -> dict[str, float]:
    """Accuracy over the batches of all ranks; collective where a process group is initialised.

    Args:
        predict: Function from images (B, 3, H, W) to logits (B, K).
        batches: This rank's batches: images, and labels (B,), of which -1 marks filler.
        device: Device on which the correct predictions are counted.

    Returns:
        `top1` and `top5` in percent, and `images`, their number over all ranks.
    """
    counts = torch.zeros(3, dtype=torch.float64, device=device)
    for images, labels in batches:
        counts += count_correct(predict(images), labels)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(counts)
    total, top1, top5 = counts.tolist()
    return {"top1": 100.0 * top1 / total, "top5": 100.0 * top5 / total, "images": int(total)}


def evaluate_module(module: nn.Module, batches: Iterable, device: torch.device) -> dict[str, float]:
    """`evaluate` of a module in eval mode and without autocast; afterwards the module is in its former mode."""
    training = module.training
    module.eval()
    try:
        return evaluate(module, batches, device)
    finally:
        module.train(training)
