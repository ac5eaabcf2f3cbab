"""How far student and teacher agree on a training batch, from logits and losses that the step has computed anyway."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from scalekd_ds.distiller import ScaleKD


@torch.no_grad()
def logit_agreement(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """Agreement of the logits, as scalars on the device.

    Args:
        student_logits: (B, K).
        teacher_logits: (B, K).

    Returns:
        `teacher/agreement_top1`: Percent of the images for which both predict the same class.
        `teacher/kl`: KL(teacher || student) at temperature 1 in nats, the mean over images.
    """
    log_student, log_teacher = (logits.detach().float().log_softmax(-1) for logits in (student_logits, teacher_logits))
    same = (student_logits.argmax(-1) == teacher_logits.argmax(-1)).float().mean()
    kl = (log_teacher.exp() * (log_teacher - log_student)).sum(-1).mean()
    return {"teacher/agreement_top1": 100.0 * same, "teacher/kl": kl}


def cosines(losses: dict[str, float], distiller: ScaleKD) -> dict[str, float]:
    """Mean cosine similarity of projected tokens and the teacher's tokens, computed from the loss terms.

    A loss term is weight * 2 / B * the sum of (1 - cosine) over B images of P tokens, so the mean cosine is
    1 - term / (2 * weight * P). Tokens of zeros are the exception: their loss is half of that of a cosine of 0.

    Args:
        losses: `loss/VIEW_STAGE` of every view and stage that has a weight.
        distiller: Has the weights and the teacher's grid.

    Returns:
        `teacher/cosine_VIEW_STAGE` for each of them.
    """
    if distiller.teacher is None or not distiller.feature_weights:
        return {}
    found, (before, after) = {}, distiller.teacher.stages
    for name, weight in distiller.feature_weights.items():
        stage = name.rsplit("_", 1)[1]
        target = before if stage == "s3" and not distiller.tpp else after
        num_tokens = target.grid[0] * target.grid[1]
        found[f"teacher/cosine_{name}"] = 1.0 - losses[f"loss/{name}"] / (2.0 * weight * num_tokens)
    return found
