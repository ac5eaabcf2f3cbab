"""The JSON card beside plain weights, which tells all that is needed to use them without this project."""

from __future__ import annotations

from typing import Any, Literal

from scalekd_ds.config import RunConfig
from scalekd_ds.distiller import ScaleKD
from scalekd_ds.models.build import architecture_and_kwargs, constructor_kwargs
from scalekd_ds.models.preprocessing import normalisation_of

CARD_VERSION = 1
# the fields that an evaluation fills
MEASURED = ("top1", "top5", "teacher_top1")


def student_card(
    cfg: RunConfig,
    distiller: ScaleKD,
    classes: list[str],
    step: int,
    accuracy: dict[str, float] | None,
    teacher_accuracy: dict[str, float] | None,
    weights: Literal["student", "ema"] = "student",
) -> dict[str, Any]:
    """Describes weights that `timm.create_model(architecture, num_classes=..., **model_kwargs)` loads strictly.

    Args:
        cfg: The run.
        distiller: Module with the student.
        classes: Names of the classes.
        step: Optimizer steps of the weights.
        accuracy: `top1` and `top5` of these weights in percent, or None.
        teacher_accuracy: The same of the teacher, or None.
        weights: Whether they are the student's own weights or their moving average.
    """
    mean, std = normalisation_of(distiller.student)
    return {
        "version": CARD_VERSION,
        "architecture": architecture_and_kwargs(cfg.student)[0],
        "model_kwargs": constructor_kwargs(cfg.student, cfg.student_kwargs, cfg.data.image_size),
        "num_classes": len(classes),
        "classes": classes,
        "image_size": cfg.data.image_size,
        "mean": list(mean),
        "std": list(std),
        "interpolation": cfg.data.interpolation,
        "eval_resize": cfg.data.eval_resize,
        "recipe": cfg.recipe,
        "weights": weights,
        "ema_decay": cfg.ema.decay if weights == "ema" else None,
        "step": step,
        "top1": accuracy["top1"] if accuracy else None,
        "top5": accuracy["top5"] if accuracy else None,
        "teacher": cfg.teacher,
        "teacher_top1": teacher_accuracy["top1"] if teacher_accuracy else None,
    }
