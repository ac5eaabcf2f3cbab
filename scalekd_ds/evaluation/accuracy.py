"""Top-1 and top-5 over all ranks, each validation image counted once."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from deepspeed import comm as dist
from torch import nn


def count_correct(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(3,) float64: images with a label, of these right at top-1, and at top-5; a label of -1 is filler."""
    real = labels >= 0
    top = logits[real].topk(min(5, logits.shape[1]), dim=1).indices == labels[real, None]
    counts = [real.sum(), top[:, 0].sum(), top.any(1).sum()]
    return torch.stack([c.to(torch.float64) for c in counts])


@torch.no_grad()
def evaluate(
    predict: Callable[[torch.Tensor], torch.Tensor], batches: Iterable, device: torch.device
) -> dict[str, float]:
    """Accuracy in percent; collective where a process group is up.

    Args:
        predict: Images (B, 3, H, W) -> logits (B, K).
        batches: (images, labels) of this rank's share; label -1 marks filler.
        device: Where the sums are kept.

    Returns:
        `top1`, `top5` in percent, and `images`, the count over all ranks.
    """
    counts = torch.zeros(3, dtype=torch.float64, device=device)
    for images, labels in batches:
        counts += count_correct(predict(images), labels)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(counts)
    total, top1, top5 = counts.tolist()
    return {"top1": 100.0 * top1 / total, "top5": 100.0 * top5 / total, "images": int(total)}


def evaluate_module(module: nn.Module, batches: Iterable, device: torch.device) -> dict[str, float]:
    """`evaluate` in eval mode and the weights' own precision; the mode is restored."""
    training = module.training
    module.eval()
    try:
        return evaluate(module, batches, device)
    finally:
        module.train(training)
