"""From one run's configuration to ScaleKD: student, teacher and projectors."""

from __future__ import annotations

from scalekd_ds.config import RunConfig
from scalekd_ds.distiller import ScaleKD
from scalekd_ds.rng import seed_everything
from scalekd_ds.student import Student, Taps
from scalekd_ds.teacher import Teacher


def build_distiller(cfg: RunConfig, num_classes: int, verbose: bool) -> ScaleKD:
    """Student, teacher and projectors of a run, with the run's seed.

    Raises:
        UserError: Names, arguments or a pair that do not fit.
    """
    seed_everything(cfg.seed)
    size, d = cfg.data.image_size, cfg.distill
    teacher = None
    if cfg.teacher != "none":
        teacher = Teacher(
            cfg.teacher,
            cfg.teacher_image_size or size,
            cfg.teacher_weights,
            features=d.features,
            input_size=cfg.teacher_image_size,
            train_mode=cfg.as_published.teacher_in_train_mode,
            **cfg.teacher_kwargs,
        )
        # a teacher that is built must not shift the student's initialisation
        seed_everything(cfg.seed)
    taps = Taps(cfg.student_taps, False) if cfg.student_taps else None
    student = Student(cfg.student, num_classes, size, cfg.student_weights, taps, **cfg.student_kwargs)
    return ScaleKD(
        student,
        teacher,
        image_size=size,
        loss=cfg.loss,
        label_smoothing=cfg.label_smoothing,
        verbose=verbose,
        **vars(d),
    )
