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
from scalekd_ds.engine.teacher_placement import blocks_of, persistence_threshold, persistent_parameters
from scalekd_ds.optim.optimizers import param_groups
from scalekd_ds.plan.fake_step import count_step, fake_tensors
from scalekd_ds.teacher import Teacher

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


@dataclass(frozen=True)
class TeacherSize:
    """Bytes of the frozen teacher in training, where autocast holds its linear layers and convolutions in 16 bits.

    Attributes:
        parameters: (elements, bytes of an element) of each parameter.
        buffers: Bytes of the buffers.
        last_stage: Bytes of the parameters that TPP reads once more, forward and backward, without `kept_whole`.
        block: Bytes of the largest block, which must be whole while it runs.
        kept_whole: Bytes of the parameters that every rank holds whole when the others are sharded.
    """

    parameters: tuple[tuple[int, int], ...] = ()
    buffers: int = 0
    last_stage: int = 0
    block: int = 0
    kept_whole: int = 0

    @property
    def bytes(self) -> int:
        """Bytes of all parameters."""
        return sum(numel * size for numel, size in self.parameters)


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
    """

    groups: tuple[tuple[TrainableParameter, ...], ...]
    buffers: int
    teacher: TeacherSize
    saved: Curve
    peak: Curve
    teacher_flop: Curve
    student_flop: Curve
    autocast: bool

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
    plain = replace(cfg, student_weights="none", teacher_weights="none")
    with torch.device("meta"):
        return build_distiller(plain, num_classes, verbose=False)


def measure(cfg: RunConfig, num_classes: int, autocast: torch.dtype | None, on_gpu: bool = True) -> Measured:
    """Measures a run's models and a step of it.

    Args:
        cfg: The run.
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
    teacher = teacher_size(distiller)
    points = [(images, *count_step(distiller, images, autocast, on_gpu)) for images in MICRO_BATCHES]
    curves = [Curve(tuple((point[0], point[i]) for point in points)) for i in range(1, 5)]
    saved, peak, targets, rest = curves
    return Measured(groups, buffers, teacher, saved, peak, targets, rest, autocast is not None)


def step_flop(cfg: RunConfig, num_classes: int, images: int, autocast: torch.dtype | None) -> int:
    """FLOP of one micro batch: teacher, forward and backward passes. It takes a third of the time of `measure`.

    Args:
        cfg: The run.
        num_classes: Classes of its data.
        images: Images in the micro batch.
        autocast: The dtype of autocast, or None for float32.

    Raises:
        UserError: `build_on_meta` cannot build the models.
    """
    distiller = build_on_meta(cfg, num_classes)
    distiller.cut = 1
    *_, teacher_flop, student_flop = count_step(distiller, images, autocast, on_gpu=False)
    return teacher_flop + student_flop


def nbytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


def _sent_in_16_bits(module: nn.Module) -> set[int]:
    """Ids of the parameters that DeepSpeed sends in 16 bits: those of the module classes that it lists, without subclasses."""
    return {
        id(parameter)
        for child in module.modules()
        if child.__class__ in LOWER_PRECISION_SAFE_MODULES
        for parameter in child.parameters(recurse=False)
    }


def teacher_size(distiller: ScaleKD) -> TeacherSize:
    """The bytes of the distiller's teacher; all 0 if there is none."""
    teacher = distiller.teacher
    if teacher is None:
        return TeacherSize()
    kept, small = persistent_parameters(teacher), persistence_threshold(teacher)
    kept_ids = {id(p) for p in kept}
    sizes = [sum(nbytes(p) for p in block.parameters() if id(p) not in kept_ids) for block in blocks_of(teacher)]
    used = _used_by_last_stage(distiller, teacher) if "s3" in distiller.projectors else []
    return TeacherSize(
        tuple((p.numel(), p.element_size()) for p in teacher.parameters()),
        sum(nbytes(b) for b in teacher.buffers()),
        sum(nbytes(p) for p in used if p.numel() > small),
        max(sizes),
        sum(nbytes(p) for p in kept),
    )


def _used_by_last_stage(distiller: ScaleKD, teacher: Teacher) -> list[torch.Tensor]:
    """The teacher's parameters that its last stage reads, found by running it on fake tensors."""
    tokens, _ = teacher.stages
    used: dict[int, nn.Parameter] = {}

    def record(module: nn.Module, *_: Any) -> None:
        used.update((id(p), p) for p in module.parameters(recurse=False))

    hooks = [module.register_forward_pre_hook(record) for module in teacher.modules()]
    try:
        with fake_tensors(distiller), torch.no_grad():
            teacher.last_stage(torch.empty(1, tokens.grid[0] * tokens.grid[1], tokens.dim))
            return [torch.empty(p.shape, dtype=p.dtype, device="meta") for p in used.values()]
    finally:
        for hook in hooks:
            hook.remove()
