"""Measures a run without its memory: bytes of student, projectors and teacher, and bytes and FLOP of a step.

The models are built on the meta device, and a step of the library's own code runs on fake tensors (`fake_step`). So a teacher
of 7 B parameters can be measured on any machine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from deepspeed.runtime.torch_autocast import LOWER_PRECISION_SAFE_MODULES
from torch import nn

from scalekd_ds.build import build_distiller
from scalekd_ds.config import RunConfig
from scalekd_ds.distiller import ScaleKD
from scalekd_ds.optim.optimizers import param_groups
from scalekd_ds.plan.fake_step import StepCount, count_step
from scalekd_ds.plan.teacher_size import TargetShape, TeacherSize, last_stage_size, nbytes, target_shape, teacher_size
from scalekd_ds.teacher_cache.sizes import STORES, TOP_LOGITS, entry_bytes

# sizes at which a step is measured: saved bytes grow linearly, but the slope of the peak changes while the batch is small
MICRO_BATCHES = (2, 8, 32)


@dataclass(frozen=True)
class TrainableParameter:
    """One trainable parameter.

    Attributes:
        numel: Elements.
        sent_in_16_bits: Whether DeepSpeed sends it, and its gradient, in autocast's 16 bits (ZeRO 1 to 3).
        of_student: Whether it belongs to the student, and not to a projector.
    """

    numel: int
    sent_in_16_bits: bool
    of_student: bool


@dataclass(frozen=True)
class Curve:
    """Bytes or FLOP as a function of the micro batch size, linear between the measured sizes and beyond them.

    Attributes:
        points: (images, bytes or FLOP) at each measured size, in ascending order.
    """

    points: tuple[tuple[int, int], ...]

    def __call__(self, images: int) -> int:
        """Bytes or FLOP of a step of so many images, on the line through the two sizes around it."""
        starts = [i for i, (size, _) in enumerate(self.points[:-1]) if size <= images]
        (x0, y0), (x1, y1) = self.points[starts[-1] if starts else 0 :][:2]
        return round(y0 + (y1 - y0) * (images - x0) / (x1 - x0))


NOTHING = Curve(((1, 0), (2, 0)))


@dataclass(frozen=True)
class Measured:
    """The measurements of a run's models and of a step.

    Attributes:
        groups: Trainable parameters by optimizer group, in the optimizer's order.
        buffers: Bytes of the trainable module's buffers.
        teacher: The frozen teacher.
        saved: Bytes that autograd saves for the backward pass, without parameters and buffers.
        peak: Most bytes at any time of a step, without parameters, buffers and complete gradients.
        teacher_flop: FLOP of the teacher's targets.
        student_flop: FLOP of everything else, forward and backward.
        autocast: Whether the step runs under autocast to 16 bits.
        last_stage: What is left of the teacher where its targets come from a teacher cache.
        targets: The shape of these targets.
        targets_peak: `peak` while the teacher gives its targets.
        peak_from_targets: `peak` of all that follows.
        read: Bytes of an image's targets that the run reads from a teacher cache; 0 where the teacher runs.
    """

    groups: tuple[tuple[TrainableParameter, ...], ...]
    buffers: int
    teacher: TeacherSize
    saved: Curve
    peak: Curve
    teacher_flop: Curve
    student_flop: Curve
    autocast: bool
    last_stage: TeacherSize
    targets: TargetShape
    targets_peak: Curve
    peak_from_targets: Curve
    read: int = 0

    @property
    def parameters(self) -> list[TrainableParameter]:
        """All trainable parameters, in the optimizer's order."""
        return [parameter for group in self.groups for parameter in group]

    @property
    def numel(self) -> int:
        """Elements of all trainable parameters."""
        return sum(parameter.numel for parameter in self.parameters)


def build_on_meta(cfg: RunConfig, num_classes: int) -> ScaleKD:
    """Builds the run's distiller on the meta device; no weights are read or downloaded.

    Raises:
        UserError: A model is unknown or its arguments are wrong, or student and teacher do not fit together.
    """
    # of a teacher cache only the shapes count, which are the teacher's
    plain = replace(cfg, student_weights="none", teacher_weights="none", teacher_cache=None)
    with torch.device("meta"):
        return build_distiller(plain, num_classes, verbose=False)


def measure(cfg: RunConfig, num_classes: int, autocast: torch.dtype | None, on_gpu: bool = True) -> Measured:
    """Measures a run's models and a step of it.

    Args:
        cfg: The run. With a teacher cache it is measured as `from_cache` has it, with the smallest entries.
        num_classes: Classes of its data.
        autocast: The dtype of autocast, or None for float32.
        on_gpu: Run both views of a stage in one pass, as on accelerators; False runs them as on CPUs.

    Raises:
        UserError: `build_on_meta` cannot build the models.
    """
    distiller = build_on_meta(cfg, num_classes)
    # a wider cut needs a constant that is computed from values, which fake tensors lack; it changes next to nothing
    distiller.cut = 1
    if distiller.teacher is not None and autocast is not None:
        distiller.teacher.lower_precision(autocast)
    sent_in_16_bits = _sent_in_16_bits(distiller) if autocast is not None else set()
    of_student = {id(p) for p in distiller.student.parameters()}
    groups = tuple(
        tuple(TrainableParameter(p.numel(), id(p) in sent_in_16_bits, id(p) in of_student) for p in group["params"])
        for group in param_groups(distiller, cfg.optim)
    )
    buffers = sum(nbytes(b) for b in distiller.buffers())
    counts = [count_step(distiller, images, autocast, on_gpu) for images in MICRO_BATCHES]
    curves: dict[str, Any] = {
        name: Curve(tuple((images, getattr(count, name)) for images, count in zip(MICRO_BATCHES, counts, strict=True)))
        for name in StepCount._fields
    }
    measured = Measured(
        groups=groups,
        buffers=buffers,
        teacher=teacher_size(distiller),
        autocast=autocast is not None,
        last_stage=last_stage_size(distiller),
        targets=target_shape(distiller),
        **curves,
    )
    if cfg.teacher_cache is None:
        return measured
    return from_cache(measured, entry_bytes(**vars(measured.targets), store=STORES[0], logits=TOP_LOGITS))


def from_cache(measured: Measured, read: int) -> Measured:
    """The measurements of the same run where a teacher cache gives the targets.

    The trunk of the teacher is not there: what is left is the last stage, whose passes (TPP) count as the student's.

    Args:
        measured: The measurements of a run with a teacher.
        read: Bytes of an image's targets in the cache.
    """
    return replace(
        measured, teacher=measured.last_stage, peak=measured.peak_from_targets, teacher_flop=NOTHING, read=read
    )


def step_flop(cfg: RunConfig, num_classes: int, images: int, autocast: torch.dtype | None) -> int:
    """FLOP of one micro batch: teacher, forward and backward passes. It takes a third of the time of `measure`.

    Args:
        cfg: The run. With a teacher cache the teacher's targets take none.
        num_classes: Classes of its data.
        images: Images in the micro batch.
        autocast: The dtype of autocast, or None for float32.

    Raises:
        UserError: `build_on_meta` cannot build the models.
    """
    distiller = build_on_meta(cfg, num_classes)
    distiller.cut = 1
    count = count_step(distiller, images, autocast, on_gpu=False)
    return count.student_flop if cfg.teacher_cache is not None else count.teacher_flop + count.student_flop


def _sent_in_16_bits(module: nn.Module) -> set[int]:
    """Ids of the parameters that DeepSpeed sends in 16 bits: those of the module classes that it lists, without subclasses."""
    return {
        id(parameter)
        for child in module.modules()
        if child.__class__ in LOWER_PRECISION_SAFE_MODULES
        for parameter in child.parameters(recurse=False)
    }
