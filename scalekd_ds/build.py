"""Builds the `ScaleKD` module (student, teacher and projectors) that a run's configuration describes."""

from __future__ import annotations

from scalekd_ds.config import RunConfig
from scalekd_ds.distiller import ScaleKD
from scalekd_ds.rng import seed_everything
from scalekd_ds.student import Student, Taps
from scalekd_ds.teacher import Teacher


def build_distiller(cfg: RunConfig, num_classes: int, verbose: bool) -> ScaleKD:
    """Builds student, teacher and projectors, each initialised from the run's seed.

    Args:
        cfg: The run.
        num_classes: Width of the student's classifier: the number of classes of the training images.
        verbose: Prints how student and teacher are paired.

    Raises:
        UserError: A model that cannot be built, or a student and a teacher that do not fit each other.
    """
    seed_everything(cfg.seed)
    image_size = cfg.data.image_size
    teacher = None
    if cfg.teacher != "none":
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
    return ScaleKD(
        student,
        teacher,
        image_size=image_size,
        loss=cfg.loss,
        label_smoothing=cfg.label_smoothing,
        verbose=verbose,
        **vars(cfg.distill),
    )
