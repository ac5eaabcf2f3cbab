"""The shapes that the diagrams show, traced through a ScaleKD of the pair that the benchmarks use."""

from __future__ import annotations

import torch
from canvas import TIMES

from scalekd_ds import ScaleKD, Teacher
from scalekd_ds.plan.fake_step import fake_tensors

TEACHER, STUDENT = "swin_small_patch4_window7_224", "resnet50"


def tokens(shape: torch.Size) -> str:
    """(B, P, C) as the diagrams write it."""
    return f"{shape[-2]} {TIMES} {shape[-1]}"


def feature_map(shape: torch.Size) -> str:
    """(B, C, h, w) as the diagrams write it."""
    return f"{shape[-2]}{TIMES}{shape[-1]} {TIMES} {shape[-3]}"


def trace() -> dict[str, str]:
    """Labels by name, from a step of one image on tensors that have shapes and no values.

    Returns:
        `images`; `teacher_before`, `teacher_last` and `teacher_logits`; `student_before`, `student_last` and
        `student_logits`; `projected` (before the teacher's last stage), `P`, `R`; `heads_s3`, `heads_s4` and
        `kd_weight`.
    """
    with torch.device("meta"):
        teacher = Teacher(TEACHER, weights="none")
        distiller = ScaleKD(STUDENT, teacher, verbose=False)
    with fake_tensors(distiller), torch.no_grad():
        images = torch.empty(1, 3, *distiller.image_size)
        targets = distiller.teacher_targets(images)
        student = distiller.tapped_student(images)
        into_last_stage = distiller.projectors["s3"](student.before)
        projected = distiller.project(student)
    before = teacher.last_input
    return {
        "images": f"{images.shape[1]} {TIMES} {images.shape[2]}{TIMES}{images.shape[3]}",
        "teacher_before": f"{before.grid[0] * before.grid[1]} {TIMES} {before.dim}",
        "teacher_last": tokens(targets.tokens.shape),
        "teacher_logits": str(targets.logits.shape[-1]),
        "student_before": feature_map(student.before.shape),
        "student_last": feature_map(student.last.shape),
        "student_logits": str(student.logits.shape[-1]),
        "projected": tokens(into_last_stage.shape),
        "P": tokens(projected["s3"]["spatial"].shape),
        "R": tokens(projected["s4"]["frequency"].shape),
        "heads_s3": str(distiller.projectors["s3"].views[0].num_heads),
        "heads_s4": str(distiller.projectors["s4"].views[0].num_heads),
        "kd_weight": f"{distiller.kd_weight:g}",
    }
