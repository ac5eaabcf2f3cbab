"""Top-1 and top-5 accuracy over all ranks, with each validation image that can be used counted once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from deepspeed import comm as dist
from torch import nn

from scalekd_ds.data.eval_loader import LEFT_OUT
from scalekd_ds.evaluation.precision import without_tf32


def count_correct(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Counts images and correct predictions of a batch.

    Args:
        logits: (B, K).
        labels: (B,) class indices; a negative one marks filler, or an image that cannot be used.

    Returns:
        (4,) float64: number of images, of those correct at top-1, of those correct at top-5, and of images that cannot be
        used.
    """
    # no rows are selected, since the host would wait for their number: a negative label is no class that is predicted
    top = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    counts = [(labels >= 0).sum(), top[:, 0].sum(), top.any(1).sum(), (labels == LEFT_OUT).sum()]
    return torch.stack([c.to(torch.float64) for c in counts])


@torch.no_grad()
def evaluate(
    predict: Callable[[torch.Tensor], torch.Tensor], batches: Iterable, device: torch.device
) -> dict[str, float]:
    """Accuracy over the batches of all ranks; collective where a process group is initialised.

    On a GPU float32 is float32, without the TF32 of PyTorch's convolutions: a number that is published should not depend on
    it. The host waits for the GPU at the end alone.

    Args:
        predict: Function from images (B, 3, H, W) to logits (B, K).
        batches: This rank's batches: images, and labels (B,) as `EvalLoader` gives them.
        device: Device on which the correct predictions are counted.

    Returns:
        `top1` and `top5` in percent, NaN where no image can be used; `images`, their number over all ranks; and
        `left_out`, the number of those that cannot be used, which `check_left_out` judges.
    """
    counts = torch.zeros(4, dtype=torch.float64, device=device)
    with without_tf32():
        for images, labels in batches:
            counts += count_correct(predict(images), labels)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(counts)
    total, top1, top5, left_out = counts.tolist()
    shares = {"top1": 100.0 * top1 / total if total else math.nan, "top5": 100.0 * top5 / total if total else math.nan}
    return {**shares, "images": int(total), "left_out": int(left_out)}


def evaluate_module(module: nn.Module, batches: Iterable, device: torch.device) -> dict[str, float]:
    """`evaluate` of a module in eval mode and without autocast; afterwards the module is in its former mode."""
    training = module.training
    module.eval()
    try:
        return evaluate(module, batches, device)
    finally:
        module.train(training)
