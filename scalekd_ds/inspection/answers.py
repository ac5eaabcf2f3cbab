"""What each model answers, and where the student and its baseline part."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path

import torch

from scalekd_ds.inspection.pictured import spread
from scalekd_ds.inspection.subjects import Subject


def top(logits: torch.Tensor, count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """(classes, confidences), (B, count) each, the most likely first."""
    values, classes = logits.float().softmax(-1).topk(min(count, logits.shape[-1]), -1)
    return classes.cpu(), values.cpu()


def batches(items: Iterable, size: int) -> Iterable[list]:
    """Lists of `size` items, the last one shorter."""
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


def answers(
    subjects: Sequence[Subject],
    images: Iterable[tuple[Path, torch.Tensor]],
    label: Callable[[Path], int | None],
    batch_size: int = 32,
) -> list[tuple[Path, list[bool]]]:
    """For each image of a known class, whether each model's first answer is right.

    Args:
        subjects: Models of the student's classes; those of other order are compared by name.
        images: (path, pixels (3, H, W) in 0 to 1).
        label: The class of a path in the first subject's classes.
        batch_size: Images at a time.
    """
    found = []
    known = ((path, pixels, truth) for path, pixels in images if (truth := label(path)) is not None)
    for batch in batches(known, batch_size):
        device = next(subjects[0].model.parameters()).device
        pixels = torch.stack([item[1] for item in batch]).to(device)
        columns = []
        for subject in subjects:
            first = subject.see(pixels).logits.argmax(-1).tolist()
            columns.append([is_right(subjects[0], subject, a, item[2]) for a, item in zip(first, batch, strict=True)])
        found += [(item[0], list(right)) for item, right in zip(batch, zip(*columns, strict=True), strict=True)]
    return found


def is_right(student: Subject, subject: Subject, answer: int, truth: int) -> bool:
    """Whether a model's class is the true one, given as the student's class."""
    if student.classes and subject.classes and set(student.classes) == set(subject.classes):
        return subject.classes[answer] == student.classes[truth]
    return answer == truth


def most_telling(found: Sequence[tuple[Path, list[bool]]]) -> list[Path]:
    """Paths in the order in which they explain a student that is worse than its baseline.

    First what the student alone gets wrong, then its mistakes that fewer of the others avoid, then the rest; each from all
    folders in turn. An image's answers are those of the student first.
    """
    kinds: dict[tuple[bool, int], list[Path]] = {}
    for path, (student, *others) in found:
        kinds.setdefault((student, -sum(others)), []).append(path)
    return [path for kind in sorted(kinds) for path in spread(kinds[kind], len(kinds[kind]))]


def crosstable(found: Sequence[tuple[Path, list[bool]]], other: str, column: int) -> str:
    """How often student and another model are right together, alone, or not at all, as one line."""
    counts = {(a, b): 0 for a in (True, False) for b in (True, False)}
    for _, right in found:
        counts[right[0], right[column]] += 1
    return (
        f"of {len(found)} images: student and {other} right {counts[True, True]}, student alone {counts[True, False]}, "
        f"{other} alone {counts[False, True]}, neither {counts[False, False]}"
    )
