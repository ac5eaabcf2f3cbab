"""How far student and teacher agree on a training batch, from what the step has computed anyway."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from scalekd_ds.distiller import ScaleKD


@torch.no_grad()
def logit_agreement(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """Scalars on the device: `teacher/agreement_top1`, the share of images in percent on which both have the same class
    first, and `teacher/kl`, KL(teacher || student) at temperature 1 in nats, the mean over images.

    Args:
        student_logits: (B, K).
        teacher_logits: (B, K).
    """
    log_student, log_teacher = (logits.detach().float().log_softmax(-1) for logits in (student_logits, teacher_logits))
    same = (student_logits.argmax(-1) == teacher_logits.argmax(-1)).float().mean()
    kl = (log_teacher.exp() * (log_teacher - log_student)).sum(-1).mean()
    return {"teacher/agreement_top1": 100.0 * same, "teacher/kl": kl}


def cosines(losses: dict[str, float], distiller: ScaleKD) -> dict[str, float]:
    """`teacher/cosine_VIEW_STAGE`, the mean cosine of a projected token and the teacher's, from the loss terms.

    A term is weight * 2 / B * the sum of (1 - cosine) over B images of P tokens, so that the cosine is
    1 - term / (2 * weight * P), but for tokens of zeros, whose loss is half of that of a cosine of 0.
    """
    found = {}
    for name, weight in distiller.feature_weights.items():
        stage = name.rsplit("_", 1)[1]
        own_target = stage == "s3" and not distiller.tpp
        place = distiller.teacher.last_input if own_target else distiller.teacher.last_output
        count = place.grid[0] * place.grid[1]
        found[f"teacher/cosine_{name}"] = 1.0 - losses[f"loss/{name}"] / (2.0 * weight * count)
    return found
