"""What a student, its projectors and its teacher weigh, counted on tensors without storage: 7 B parameters fit anywhere.

The models are built on the meta device. One step of the library's own code then runs on fake tensors, which have shapes,
types and autocast, and no memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from deepspeed.runtime.torch_autocast import LOWER_PRECISION_SAFE_MODULES
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from scalekd_ds.build import build_distiller
from scalekd_ds.config import RunConfig
from scalekd_ds.distiller import ScaleKD
from scalekd_ds.engine.teacher_placement import blocks_of, kept_whole, small_parameter
from scalekd_ds.optim.optimizers import param_groups

# what autograd saves is a straight line; where the peak falls, and its slope, change while the batch is small
MICRO_BATCHES = (2, 8, 32)


@dataclass(frozen=True)
class Layer:
    """One trainable parameter.

    Attributes:
        numel: Elements.
        low: DeepSpeed sends it, and its gradient, in autocast's 16 bits (ZeRO 1 to 3).
        student: Of the student, not of a projector.
    """

    numel: int
    low: bool
    student: bool


@dataclass(frozen=True)
class Curve:
    """Bytes, or FLOP, of a micro batch: straight between the sizes that were counted, and beyond them."""

    points: tuple[tuple[int, int], ...]

    def __call__(self, images: int) -> int:
        starts = [i for i, (size, _) in enumerate(self.points[:-1]) if size <= images]
        (x0, y0), (x1, y1) = self.points[starts[-1] if starts else 0 :][:2]
        return round(y0 + (y1 - y0) * (images - x0) / (x1 - x0))


@dataclass(frozen=True)
class TeacherSize:
    """Bytes of the frozen teacher as training holds it (16 bits for linear layers and convolutions under autocast).

    Attributes:
        parameters: Bytes of each parameter, with its elements: (elements, bytes of one).
        buffers: Bytes.
        last_stage: Bytes of the parameters that TPP reads once more, forward and backward, `kept_whole` left out.
        block: Bytes of the largest block, which has to be whole while it runs.
        kept_whole: Bytes of what every rank holds whole when the others are sharded.
    """

    parameters: tuple[tuple[int, int], ...] = ()
    buffers: int = 0
    last_stage: int = 0
    block: int = 0
    kept_whole: int = 0

    @property
    def bytes(self) -> int:
        return sum(numel * size for numel, size in self.parameters)


@dataclass(frozen=True)
class Measured:
    """One pair, counted.

    Attributes:
        groups: Trainable parameters by optimizer group, in the optimizer's order.
        buffers: Bytes of the trainable module's buffers.
        teacher: The frozen teacher.
        saved: Bytes that autograd keeps from the forward pass for the backward pass; parameters and buffers left out.
        peak: Largest bytes alive in a step beside parameters, buffers, and gradients once they are complete.
        teacher_flop, student_flop: FLOP of the teacher's targets, and of everything else, forward and backward.
        autocast: Counted under autocast to 16 bits.
    """

    groups: tuple[tuple[Layer, ...], ...]
    buffers: int
    teacher: TeacherSize
    saved: Curve
    peak: Curve
    teacher_flop: Curve
    student_flop: Curve
    autocast: bool

    @property
    def layers(self) -> list[Layer]:
        return [layer for group in self.groups for layer in group]

    @property
    def numel(self) -> int:
        """Trainable parameters."""
        return sum(layer.numel for layer in self.layers)


def build_on_meta(cfg: RunConfig, num_classes: int) -> ScaleKD:
    """The run's distiller on the meta device: no weights are read or downloaded.

    Raises:
        UserError: Names, arguments or a pair that do not fit, as in training.
    """
    plain = replace(cfg, student_weights="none", teacher_weights="none")
    with torch.device("meta"):
        return build_distiller(plain, num_classes, verbose=False)


def measure(cfg: RunConfig, num_classes: int, autocast: torch.dtype | None, on_gpu: bool = True) -> Measured:
    """Counts a run's models and one of its steps.

    Args:
        cfg: The run.
        num_classes: Classes of its data.
        autocast: Its dtype, or None for float32.
        on_gpu: Both views of a stage in one pass, as on accelerators; False counts the path of CPUs.

    Raises:
        UserError: Names, arguments or a pair that do not fit.
    """
    distiller = build_on_meta(cfg, num_classes)
    # a wider cut multiplies by a constant that is made from values, which there are none of here; it saves next to nothing
    distiller.cut = 1
    if distiller.teacher is not None and autocast is not None:
        distiller.teacher.lower(autocast)
    low = _low_precision(distiller) if autocast is not None else set()
    student = {id(p) for p in distiller.student.parameters()}
    groups = tuple(
        tuple(Layer(p.numel(), id(p) in low, id(p) in student) for p in group["params"])
        for group in param_groups(distiller, cfg.optim)
    )
    buffers = sum(nbytes(b) for b in distiller.buffers())
    teacher = teacher_size(distiller)
    points = [(images, *_step(distiller, images, autocast, on_gpu)) for images in MICRO_BATCHES]
    curves = [Curve(tuple((point[0], point[i]) for point in points)) for i in range(1, 5)]
    return Measured(groups, buffers, teacher, *curves, autocast is not None)


def step_flop(cfg: RunConfig, num_classes: int, images: int, autocast: torch.dtype | None) -> int:
    """FLOP of one micro batch of `images`, teacher, forward and backward passes: a third of `measure`'s time.

    Raises:
        UserError: Names, arguments or a pair that do not fit.
    """
    distiller = build_on_meta(cfg, num_classes)
    distiller.cut = 1
    *_, teacher_flop, student_flop = _step(distiller, images, autocast, on_gpu=False)
    return teacher_flop + student_flop


def nbytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


def _low_precision(module: nn.Module) -> set[int]:
    """Ids of the parameters that DeepSpeed sends in 16 bits: those of exactly the classes that it lists, no subclass."""
    return {
        id(parameter)
        for child in module.modules()
        if child.__class__ in LOWER_PRECISION_SAFE_MODULES
        for parameter in child.parameters(recurse=False)
    }


def teacher_size(distiller: ScaleKD) -> TeacherSize:
    """Bytes of the teacher, of what TPP uses of it, and of its largest block."""
    teacher = distiller.teacher
    if teacher is None:
        return TeacherSize()
    kept, small = kept_whole(teacher), small_parameter(teacher)
    kept_ids = {id(p) for p in kept}
    sizes = [sum(nbytes(p) for p in block.parameters() if id(p) not in kept_ids) for block in blocks_of(teacher)]
    used = _used_by_last_stage(distiller) if "s3" in distiller.projectors else []
    return TeacherSize(
        tuple((p.numel(), p.element_size()) for p in teacher.parameters()),
        sum(nbytes(b) for b in teacher.buffers()),
        sum(nbytes(p) for p in used if p.numel() > small),
        max(sizes),
        sum(nbytes(p) for p in kept),
    )


def _used_by_last_stage(distiller: ScaleKD) -> list[nn.Parameter]:
    """The teacher's parameters that a dry pass of its last stage reads."""
    teacher, place = distiller.teacher, distiller.teacher.last_input
    used: dict[int, nn.Parameter] = {}

    def note(module: nn.Module, *_: Any) -> None:
        used.update((id(p), p) for p in module.parameters(recurse=False))

    hooks = [module.register_forward_pre_hook(note) for module in teacher.modules()]
    try:
        with _fake(distiller), torch.no_grad():
            teacher.last_stage(torch.empty(1, place.grid[0] * place.grid[1], place.dim))
            return [torch.empty(p.shape, dtype=p.dtype, device="meta") for p in used.values()]
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _fake(distiller: ScaleKD) -> Iterator[None]:
    """Fake tensors in place of the distiller's and the teacher's meta ones, for the time of the block."""
    modules = [m for top in (distiller, distiller.teacher) if top is not None for m in top.modules()]
    kept = [(m, dict(m._parameters), dict(m._buffers)) for m in modules]
    fakes: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        if id(tensor) not in fakes:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            is_parameter = isinstance(tensor, nn.Parameter)
            fakes[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
        return fakes[id(tensor)]

    with FakeTensorMode():
        try:
            for module, parameters, buffers in kept:
                module._parameters.update({name: fake(p) for name, p in parameters.items()})
                module._buffers.update({name: fake(b) for name, b in buffers.items()})
            yield
        finally:
            for module, parameters, buffers in kept:
                module._parameters.update(parameters)
                module._buffers.update(buffers)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every storage that operations make, until it is freed; those of `held` tensors left out."""

    def __init__(self, held: list[torch.Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen = weakref.WeakSet(tensor.untyped_storage() for tensor in held)

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._seen:
            self._seen.add(storage)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._freed, storage.nbytes())

    def _freed(self, count: int) -> None:
        self.live -= count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                self.add(value)
        return out


class SavedBytes:
    """Bytes that autograd saves inside the `with` block, each storage once, those of `held` tensors left out."""

    def __init__(self, held: list[torch.Tensor]) -> None:
        self._held = {t.untyped_storage()._cdata for t in held}
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._held:
            self._storages[storage._cdata] = storage
        return tensor

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        self.bytes = sum(storage.nbytes() for storage in self._storages.values())
        self._storages.clear()


def held_tensors(distiller: ScaleKD) -> list[torch.Tensor]:
    """Parameters and buffers of student, projectors and teacher."""
    tops = [top for top in (distiller, distiller.teacher) if top is not None]
    return [t for top in tops for t in (*top.parameters(), *top.buffers())]


def _step(distiller: ScaleKD, images: int, dtype: torch.dtype | None, on_gpu: bool) -> tuple[int, int, int, int]:
    """(bytes saved, peak bytes, teacher's FLOP, student's FLOP) of one micro batch."""
    autocast = torch.autocast("cpu", dtype) if dtype is not None else nullcontext()
    pairs = [pair for pair in distiller.projectors.values() if on_gpu and len(pair.views) > 1]
    for pair in pairs:
        pair.forward = pair.stacked
    try:
        with _fake(distiller), LiveBytes(held_tensors(distiller)) as live:
            for parameter in distiller.parameters():
                parameter.register_post_accumulate_grad_hook(_drop)
            batch, labels = torch.empty(images, 3, *distiller.image_size), torch.empty(images, dtype=torch.int64)
            flop = FlopCounterMode(display=False)
            targets, teacher_flop = None, 0
            with flop:
                if distiller.teacher is not None:
                    targets = distiller.teacher_targets(batch)
                    teacher_flop = flop.get_total_flops()
                with SavedBytes(held_tensors(distiller)) as saved, autocast:
                    total = distiller(batch, labels, targets)["loss/total"]
                total.backward()
            return saved.bytes, live.peak, teacher_flop, flop.get_total_flops() - teacher_flop
    finally:
        for pair in pairs:
            del pair.forward


def _drop(parameter: nn.Parameter) -> None:
    # complete gradients are a part of their own, and ZeRO shards them
    parameter.grad = None
