"""Compares the predictions of the models, and finds the images on which student and baseline disagree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice

import torch

from scalekd_ds.inspection.images import AnyImage, spread_over_folders
from scalekd_ds.inspection.inspected_models import InspectedModel, positions_of


def top_classes(logits: torch.Tensor, count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """(classes, probabilities) of the `count` most likely classes, (B, count) each, the most likely first.

    Args:
        logits: (B, K).
        count: Number of classes; K if there are fewer.
    """
    values, classes = logits.float().softmax(-1).topk(min(count, logits.shape[-1]), -1)
    return classes.cpu(), values.cpu()


def batches(items: Iterable, size: int) -> Iterable[list]:
    """Yields lists of `size` items; the last one may be shorter."""
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


def correctness(
    models: Sequence[InspectedModel],
    images: Iterable[tuple[AnyImage, torch.Tensor]],
    label: Callable[[AnyImage], int | None],
    batch_size: int = 32,
) -> list[tuple[AnyImage, list[bool]]]:
    """For each image of a known class, whether the first prediction of each model is right.

    Args:
        models: The student, and models with the same classes, which may be in another order.
        images: (image, pixels (3, H, W) in 0 to 1).
        label: Image -> its class in the order of the student's, or None if unknown; such images are left out.
        batch_size: Images in a forward pass.

    Returns:
        (image, whether each of `models` is right) of each image.
    """
    found = []
    outputs = [positions_of(models[0], model) for model in models]
    known = ((path, pixels, truth) for path, pixels in images if (truth := label(path)) is not None)
    for batch in batches(known, batch_size):
        device = next(models[0].model.parameters()).device
        pixels = torch.stack([item[1] for item in batch]).to(device)
        columns = []
        for model, output in zip(models, outputs, strict=True):
            first = model.run(pixels).answers.argmax(-1).tolist()
            columns.append([c == output[item[2]] for c, item in zip(first, batch, strict=True)])
        found += [(item[0], list(right)) for item, right in zip(batch, zip(*columns, strict=True), strict=True)]
    return found


def order_by_disagreement(found: Sequence[tuple[AnyImage, list[bool]]]) -> list[AnyImage]:
    """Paths ordered by how well they show why a student is worse than its baseline.

    The images that the student alone gets wrong come first, then its mistakes in the order of how many other models are
    right, then the rest. Images of equal rank alternate between the folders.

    Args:
        found: From `correctness`, with the student as the first model.
    """
    by_rank: dict[tuple[bool, int], list[AnyImage]] = {}
    for path, (student, *others) in found:
        by_rank.setdefault((student, -sum(others)), []).append(path)
    return [path for rank in sorted(by_rank) for path in spread_over_folders(by_rank[rank], len(by_rank[rank]))]


def crosstable(found: Sequence[tuple[AnyImage, list[bool]]], other: str, column: int) -> str:
    """One line that counts the images on which the student, another model, both or neither are right.

    Args:
        found: From `correctness`, with the student as the first model.
        other: What the other model is called.
        column: Its position among the models.
    """
    counts = {(a, b): 0 for a in (True, False) for b in (True, False)}
    for _, right in found:
        counts[right[0], right[column]] += 1
    return (
        f"of {len(found)} images: student and {other} right {counts[True, True]}, student alone {counts[True, False]}, "
        f"{other} alone {counts[False, True]}, neither {counts[False, False]}"
    )
