"""Bytes of the frozen teacher and of its last stage, and the shape of its targets, from models on the meta device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from scalekd_ds.distiller import ScaleKD
from scalekd_ds.engine.teacher_placement import blocks_of, persistence_threshold, persistent_parameters
from scalekd_ds.plan.fake_step import fake_tensors
from scalekd_ds.teacher import Teacher


@dataclass(frozen=True)
class TeacherSize:
    """Bytes of the frozen teacher in training, where autocast holds its linear layers and convolutions in 16 bits.

    Attributes:
        gives_targets: Whether all of it runs once for the targets; not where they come from a teacher cache.
        parameters: (elements, bytes of an element) of each parameter.
        buffers: Bytes of the buffers.
        last_stage: Bytes of the parameters that TPP reads once more, forward and backward, without `kept_whole`.
        block: Bytes of the largest block, which must be whole while it runs.
        kept_whole: Bytes of the parameters that every rank holds whole when the others are sharded.
    """

    gives_targets: bool = True
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
class TargetShape:
    """The teacher's targets of one image.

    Attributes:
        tokens: Tokens P of its last stage; 0 for a teacher that is used for its logits only.
        dim: Channels C of a token.
        classes: Classes K; 0 for a teacher without a classifier.
    """

    tokens: int = 0
    dim: int = 0
    classes: int = 0


def teacher_size(distiller: ScaleKD) -> TeacherSize:
    """The bytes of the distiller's teacher; all 0 if there is none."""
    teacher = distiller.teacher
    if teacher is None:
        return TeacherSize()
    small = persistence_threshold(teacher)
    large = [p for p in _last_stage_of(teacher, distiller).parameters() if p.numel() > small]
    return _size_of(teacher, persistent_parameters(teacher), large if _reads_last_stage(distiller) else [])


def last_stage_size(distiller: ScaleKD) -> TeacherSize:
    """The bytes of the teacher's last stage by itself; all 0 if there is no teacher, or one whose logits alone are used.

    Tables of the trunk's windows and positions, which stay as buffers where the trunk is left out, are not counted.
    """
    teacher = distiller.teacher
    if teacher is None or teacher.family is None:
        return TeacherSize(gives_targets=False)
    last_stage = _last_stage_of(teacher, distiller)
    parameters, small = list(last_stage.parameters()), persistence_threshold(last_stage)
    large = [p for p in parameters if p.numel() > small]
    kept = [p for p in parameters if p.numel() <= small]
    size = _size_of(last_stage, kept, large if _reads_last_stage(distiller) else [])
    return replace(size, gives_targets=False)


def _size_of(module: nn.Module, kept: list[nn.Parameter], last_stage: list[nn.Parameter]) -> TeacherSize:
    """The bytes of a module of which every rank keeps some parameters whole."""
    kept_ids = {id(p) for p in kept}
    return TeacherSize(
        parameters=tuple((p.numel(), p.element_size()) for p in module.parameters()),
        buffers=sum(nbytes(b) for b in module.buffers()),
        last_stage=sum(nbytes(p) for p in last_stage),
        block=max(sum(nbytes(p) for p in block.parameters() if id(p) not in kept_ids) for block in blocks_of(module)),
        kept_whole=sum(nbytes(p) for p in kept),
    )


def _reads_last_stage(distiller: ScaleKD) -> bool:
    """Whether a term passes through the teacher's last stage (TPP)."""
    return distiller.tpp and "s3" in distiller.projectors


def _last_stage_of(teacher: Teacher, distiller: ScaleKD) -> nn.ModuleList:
    """The teacher's modules that its last stage calls, found by running it on fake tensors; empty without features.

    They come with all that is below them, since an attention may read the weights of a layer that it does not call.
    """
    if teacher.family is None:
        return nn.ModuleList()
    (tokens, _), called = teacher.stages, dict[int, nn.Module]()

    def record(module: nn.Module, *_: Any) -> None:
        called.setdefault(id(module), module)

    hooks = [module.register_forward_pre_hook(record) for module in teacher.modules()]
    try:
        with fake_tensors(distiller), torch.no_grad():
            teacher.last_stage(torch.empty(1, tokens.grid[0] * tokens.grid[1], tokens.dim))
    finally:
        for hook in hooks:
            hook.remove()
    below = {id(m) for module in called.values() for m in list(module.modules())[1:]}
    return nn.ModuleList(module for module in called.values() if id(module) not in below)


def target_shape(distiller: ScaleKD) -> TargetShape:
    """The shape of the teacher's targets of one image; all 0 if there is none."""
    teacher = distiller.teacher
    if teacher is None:
        return TargetShape()
    stage = teacher.last_output
    return TargetShape(*((stage.grid[0] * stage.grid[1], stage.dim) if stage else (0, 0)), teacher.num_classes)


def nbytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()
