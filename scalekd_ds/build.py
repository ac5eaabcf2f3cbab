"""Builds the `ScaleKD` module (student, teacher and projectors) that a run's configuration describes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from scalekd_ds.config import RunConfig
from scalekd_ds.distiller import ScaleKD
from scalekd_ds.errors import UserError, say
from scalekd_ds.models.known_classes import fit_classifier
from scalekd_ds.rng import seed_everything
from scalekd_ds.student import Student, Taps
from scalekd_ds.teacher import Teacher


def build_distiller(
    cfg: RunConfig,
    num_classes: int,
    verbose: bool,
    classes: Sequence[str] | None = None,
    teacher: Teacher | None = None,
) -> ScaleKD:
    """Builds student, teacher and projectors, each initialised from the run's seed.

    Args:
        cfg: The run.
        num_classes: Width of the student's classifier: the number of classes of the training images.
        verbose: Prints how student and teacher are paired.
        classes: Names of the classes, by which the teacher's logits and a classifier that comes with the student's weights
            are put into their order; None leaves both as they are.
        teacher: The last stage of a teacher whose answers are cached; None builds the teacher of the run.

    Raises:
        UserError: A model that cannot be built, a student and a teacher that do not fit each other, or a teacher of other
            classes.
    """
    seed_everything(cfg.seed)
    image_size = cfg.data.image_size
    is_cached = teacher is not None
    if teacher is None and cfg.teacher != "none":
        teacher = Teacher(
            cfg.teacher,
            cfg.teacher_image_size or image_size,
            cfg.teacher_weights,
            features=cfg.distill.features,
            input_size=cfg.teacher_image_size,
            train_mode=cfg.as_published.teacher_in_train_mode,
            **cfg.teacher_kwargs,
        )
        # building the teacher drew random numbers: without this, it would change the student's initialisation
        seed_everything(cfg.seed)
    taps = Taps(cfg.student_taps, normed_last=False) if cfg.student_taps else None
    student = Student(cfg.student, num_classes, image_size, cfg.student_weights, taps, **cfg.student_kwargs)
    if classes is not None:
        say(fit_classifier(student.model, classes))
    distiller = ScaleKD(
        student,
        teacher,
        image_size=image_size,
        loss=cfg.loss,
        label_smoothing=cfg.label_smoothing,
        verbose=verbose,
        **vars(cfg.distill),
    )
    # cached answers are in the order of the classes
    if classes is not None and teacher is not None and not is_cached and teacher.num_classes == len(classes):
        _match_teacher(distiller, teacher, classes)
    return distiller


def build_answering(cfg: RunConfig, num_classes: int, classes: Sequence[str]) -> ScaleKD:
    """Builds the run's teacher, and a student that says how its images come; without projectors, for `teacher_targets` alone.

    The arguments and errors are those of `build_distiller`.
    """
    # terms of weight 0 have no projectors
    distill = dataclasses.replace(cfg.distill, weights_s3=(0.0, 0.0), weights_s4=(0.0, 0.0), tpp=True)
    alone = dataclasses.replace(cfg, distill=distill, student_weights="none", teacher_cache=None)
    return build_distiller(alone, num_classes, verbose=False, classes=classes)


def _match_teacher(distiller: ScaleKD, teacher: Teacher, classes: Sequence[str]) -> None:
    """Puts the teacher's logits into the order of the classes; other classes are an error where logits are distilled."""
    try:
        say(teacher.match(classes))
    except UserError as error:
        if distiller.kd_weight > 0.0:
            raise UserError(
                f"{error} Logit KD compares class by class: fine-tune the teacher on these classes, or set "
                "--distill.kd_weight 0."
            ) from None
        teacher.same_classes = False
        say(f"{str(error).rstrip('.')}: its top-1 is not measured")
