"""Counts bytes and FLOP of one training step on fake tensors, which have shapes, types and autocast, and no memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from scalekd_ds.distiller import ScaleKD


@contextmanager
def fake_tensors(distiller: ScaleKD) -> Iterator[None]:
    """Context manager that replaces the meta tensors of distiller and teacher by fake ones, and makes new tensors fake."""
    modules = [m for root in (distiller, distiller.teacher) if root is not None for m in root.modules()]
    originals = [(m, dict(m._parameters), dict(m._buffers)) for m in modules]
    fakes: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor | None) -> Any:
        if tensor is None:
            return None
        if id(tensor) not in fakes:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            is_parameter = isinstance(tensor, nn.Parameter)
            fakes[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
        return fakes[id(tensor)]

    with FakeTensorMode():
        try:
            for module, parameters, buffers in originals:
                module._parameters.update({name: fake(p) for name, p in parameters.items()})
                module._buffers.update({name: fake(b) for name, b in buffers.items()})
            yield
        finally:
            for module, parameters, buffers in originals:
                module._parameters.update(parameters)
                module._buffers.update(buffers)


class StepCount(NamedTuple):
    """Bytes and FLOP of one micro batch.

    Attributes:
        saved: Bytes that autograd saves for the backward pass.
        peak: Most bytes at any time, without parameters and buffers.
        targets_peak: The same while the teacher gives its targets.
        peak_from_targets: The same of all that follows, which is what a run has whose targets come from a teacher cache.
        teacher_flop: FLOP of the teacher's targets.
        student_flop: FLOP of everything else, forward and backward, TPP's passes through the last stage among them.
    """

    saved: int
    peak: int
    targets_peak: int
    peak_from_targets: int
    teacher_flop: int
    student_flop: int


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations have made and that are not freed yet.

    Args:
        excluded: Tensors whose storages are not counted.

    Attributes:
        live: Bytes now.
        peak: Most bytes at any time.
    """

    def __init__(self, excluded: list[torch.Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen = weakref.WeakSet(tensor.untyped_storage() for tensor in excluded)

    def add(self, tensor: torch.Tensor) -> None:
        """Counts the storage of a tensor, unless it was counted before."""
        storage = tensor.untyped_storage()
        if storage not in self._seen:
            self._seen.add(storage)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._freed, storage.nbytes())

    def restart(self) -> int:
        """The peak so far, which is counted anew from here."""
        peak, self.peak = self.peak, self.live
        return peak

    def _freed(self, count: int) -> None:
        self.live -= count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                self.add(value)
        return out


class SavedBytes:
    """Counts the bytes that autograd saves for the backward pass inside the `with` block, each storage once.

    Args:
        excluded: Tensors whose storages are not counted.

    Attributes:
        bytes: The bytes, once the block has ended.
    """

    def __init__(self, excluded: list[torch.Tensor]) -> None:
        self._excluded = {t.untyped_storage()._cdata for t in excluded}
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._excluded:
            self._storages[storage._cdata] = storage
        return tensor

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        self.bytes = sum(storage.nbytes() for storage in self._storages.values())
        self._storages.clear()


def parameters_and_buffers(distiller: ScaleKD) -> list[torch.Tensor]:
    """The parameters and buffers of student, projectors and teacher."""
    roots = [root for root in (distiller, distiller.teacher) if root is not None]
    return [t for root in roots for t in (*root.parameters(), *root.buffers())]


def count_step(distiller: ScaleKD, images: int, dtype: torch.dtype | None, on_gpu: bool) -> StepCount:
    """Runs one micro batch on fake tensors.

    Args:
        distiller: The distiller on the meta device.
        images: Images in the micro batch.
        dtype: The dtype of autocast, or None for float32.
        on_gpu: Run both views of a stage in one pass, as on accelerators; False runs them as on CPUs.
    """
    autocast = torch.autocast("cpu", dtype) if dtype is not None else nullcontext()
    projectors: Iterable[Any] = distiller.projectors.values()
    pairs = [pair for pair in projectors if on_gpu and len(pair.views) > 1]
    for pair in pairs:
        pair.forward = pair.stacked
    try:
        with fake_tensors(distiller), LiveBytes(parameters_and_buffers(distiller)) as live:
            for parameter in distiller.parameters():
                parameter.register_post_accumulate_grad_hook(_discard_gradient)
            batch, labels = torch.empty(images, 3, *distiller.image_size), torch.empty(images, dtype=torch.int64)
            flop = FlopCounterMode(display=False)
            targets, teacher_flop = None, 0
            with flop:
                if distiller.teacher is not None:
                    targets = distiller.teacher_targets(batch)
                    teacher_flop = flop.get_total_flops()
                targets_peak = live.restart()
                with SavedBytes(parameters_and_buffers(distiller)) as saved, autocast:
                    total = distiller(batch, labels, targets)["loss/total"]
                total.backward()
            student_flop = flop.get_total_flops() - teacher_flop
            peak = max(targets_peak, live.peak)
            return StepCount(saved.bytes, peak, targets_peak, live.peak, teacher_flop, student_flop)
    finally:
        for pair in pairs:
            del pair.forward


def _discard_gradient(parameter: nn.Parameter) -> None:
    # complete gradients are counted as a part of their own, since ZeRO shards them
    parameter.grad = None
