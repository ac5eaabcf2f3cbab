"""Counts what a step asks of a GPU: kernels, and what makes the host wait."""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# operators whose result has a size, or decides a branch, that only the device knows
_SYNC = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::is_nonzero",
    "aten::equal",
    "aten::bincount",
}
# operators that launch nothing, beside views
_NO_KERNEL = {
    "aten::detach",
    "aten::empty",
    "aten::empty_like",
    "aten::new_empty",
    "aten::empty_strided",
    "aten::new_empty_strided",
    "aten::_unsafe_view",
    "aten::alias",
    "aten::lift_fresh",
    "aten::is_pinned",
    "aten::_pin_memory",
    "aten::resize_",
    "aten::record_stream",
    "prim::device",
}
# tensors that one kernel of a `_foreach_` operator takes, on the safe side: 110 of one list, 36 of four lists
_FOREACH_TENSORS = 30


class Watch(TorchDispatchMode):
    """Counts launches, host syncs and blocking copies of what runs inside; enter it inside of `tensors`.

    Args:
        own: Names of packages' folders whose lines are named as the place of a sync.

    Attributes:
        launches: Part of the step -> kernels, one for each operation that computes on a GPU.
        operations: Name of the operator -> kernels.
        syncs: Place (file:line and operator) -> how often the host waits there for the GPU.
        copies: Place -> how often the host waits for a copy to the GPU, or the copy is from memory that is not pinned.
        attention: Names of PyTorch's fused attentions that were taken, with the head size -> how often.

    Raises:
        RuntimeError: Inside, where tensors of two devices meet in one operation.
    """

    def __init__(self, own: tuple[str, ...] = ("scalekd_ds", "kernels", "timm", "deepspeed")) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.operations: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.attention: Counter[tuple[str, int]] = Counter()
        self._own, self._part = own, "else"
        self._pinned: weakref.WeakSet = weakref.WeakSet()
        self._launchers: dict[str, Callable[..., Any]] = {}
        self._in_launcher = 0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Context manager: launches inside count for the part `name`; `ScaleKD.time_part` may be this method."""
        outer, self._part = self._part, name
        try:
            yield
        finally:
            self._part = outer

    def run_launcher(self, operator: str, launcher: Callable[..., Any]) -> None:
        """Runs `launcher` in place of an own operator, such as `scalekd_ds::dual_view`, and counts what that does."""
        self._launchers[operator] = launcher

    def kernel(self, name: str, tensors: Any = ()) -> None:
        """Counts one kernel that is no operator of PyTorch; `tensors` are its arguments, for those who look at them."""
        self.launches[self._part] += 1
        self.operations[name] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict | None = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name
        if name in self._launchers:
            self._in_launcher += 1
            try:
                with self:
                    return self._launchers[name](*args, **kwargs)
            finally:
                self._in_launcher -= 1
        if self._in_launcher and name.startswith("aten::") and func._can_decompose():
            # below autograd operators come as they were called, such as `item` and `to`
            with self:
                return func.decompose(*args, **kwargs)
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        devices = {t.device for t in inputs if t.dim() or t.device.type == "cuda"}
        on_gpu = any(device.type == "cuda" for device in devices)
        if on_gpu and len(devices) > 1 and name not in ("aten::copy_", "aten::_to_copy"):
            raise RuntimeError(f"{name} gets tensors of {sorted(map(str, devices))} at {self._place()}")
        if on_gpu and (name in _SYNC or _has_mask(name, args)):
            self.syncs[f"{self._place()} {name}"] += 1
        if name in ("aten::_local_scalar_dense", "aten::equal"):
            try:
                # a number that the host knows
                return func(*args, **kwargs)
            except DataDependentOutputException:
                is_bool = name == "aten::equal" or inputs[0].dtype == torch.bool
                return True if is_bool else 1.0 if inputs[0].is_floating_point() else 1
        if name == "aten::index" and _has_mask(name, args):
            # as if every row were taken
            args = (args[0], [_all_rows(i) for i in args[1]])
        if name == "aten::nonzero":
            return inputs[0].new_empty((inputs[0].numel(), inputs[0].dim()), dtype=torch.int64)
        if name in ("aten::_to_copy", "aten::copy_"):
            # else a value that is known on the host would be copied to a real GPU
            for tensor in inputs:
                if isinstance(tensor, FakeTensor):
                    tensor.constant = None
        # fake tensors have no pinned memory
        out = torch.empty_like(args[0]) if name == "aten::_pin_memory" else func(*args, **kwargs)
        outputs = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        if kwargs.get("pin_memory") or name == "aten::_pin_memory":
            self._pinned.update(t.untyped_storage() for t in outputs)
        if on_gpu or any(t.device.type == "cuda" for t in outputs):
            self._count(func, name, args, kwargs, outputs)
        return out

    def _count(self, func: Any, name: str, args: Any, kwargs: dict, outputs: list) -> None:
        if name in ("aten::copy_", "aten::_to_copy"):
            source, target = (args[1], args[0]) if name == "aten::copy_" else (args[0], outputs[0])
            if source.device != target.device:
                is_async = kwargs.get("non_blocking") or (name == "aten::copy_" and len(args) > 2 and args[2])
                host = source if source.device.type == "cpu" else target
                pinned = host.untyped_storage() in self._pinned
                shape = f"{tuple(source.shape)} {str(source.dtype).removeprefix('torch.')}"
                if target.device.type == "cpu" and not (is_async and pinned):
                    self.syncs[f"{self._place()} {shape} to the CPU"] += 1
                elif source.device.type == "cpu" and not (is_async and pinned):
                    why = "pageable" if is_async else "blocking"
                    self.copies[f"{self._place()} {shape} {why}"] += 1
        if "_scaled_dot_product_" in name and "backward" not in name:
            self.attention[name.removeprefix("aten::"), args[0].shape[-1]] += 1
        if name in _NO_KERNEL or _is_view(func):
            return
        count = 1
        if name.startswith(("aten::_foreach", "aten::_fused")):
            count = -(-len(args[0]) // _FOREACH_TENSORS)
        self.launches[self._part] += count
        self.operations[name] += count

    def _place(self) -> str:
        """The innermost line of an own package that is being run; autograd's threads have none."""
        frame = sys._getframe(2)
        while frame is not None:
            parts = frame.f_code.co_filename.split("/")
            found = next((i for i, part in enumerate(parts) if part in self._own), None)
            if found is not None and "torch" not in parts and "fake_cuda" not in parts:
                return "/".join(parts[found:]) + f":{frame.f_lineno}"
            frame = frame.f_back
        return "autograd"


def _is_view(func: Any) -> bool:
    """Whether an operator returns a part of its input and writes nothing."""
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


def _masks(name: str, args: Any) -> list[torch.Tensor]:
    if name not in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"):
        return []
    return [i for i in args[1] if isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8)]


def _has_mask(name: str, args: Any) -> bool:
    """Whether an index has a boolean mask, whose true elements must be counted; one value is filled in without."""
    return bool(_masks(name, args)) and not (name != "aten::index" and args[2].numel() == 1)


def _all_rows(index: torch.Tensor | None) -> torch.Tensor | None:
    is_mask = isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)
    return torch.empty(index.shape[0], dtype=torch.int64, device=index.device) if is_mask else index
