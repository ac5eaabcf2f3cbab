"""Bytes and FLOP of the kernels of one operator, from the shapes of its tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from roofline_parts.cards import HEAVY_FLOP, LIGHT_FLOP


class Kernel(TypedDict):
    """A kernel, or several of the same operator and shapes that run one after another.

    Attributes:
        op: Operator, or the operators that inductor has fused.
        shape: Shapes of what it reads, or writes where it reads nothing, in short.
        part: Part of the step.
        read: Bytes, each distinct tensor once; a dimension that is broadcast counts once.
        written: Bytes.
        flop: Floating-point operations.
        unit: What computes them: `half` and `tf32` are tensor cores, `fp32` is CUDA cores.
        must: Bytes that it cannot do without in the floor; None for a kernel that a neighbour could take in.
        kernels: Kernels on the device.
        launches: Launches by the host, as `fake_cuda.Watch` counts them.
        waits: Whether the host waits for the device afterwards.
    """

    op: str
    shape: str
    part: str
    read: int
    written: int
    flop: int
    unit: str
    must: int | None
    kernels: int
    launches: int
    waits: bool


# what they write does not depend on what was there
_OVERWRITES = {"aten::copy_", "aten::zero_", "aten::fill_", "aten::_foreach_copy_", "aten::_foreach_zero_"}
# they take no more of their input than its shape
_FILLS = {f"aten::{name}" for name in ("ones_like", "zeros_like", "full_like", "new_zeros", "new_ones", "new_full")}
# of their first tensor they read as much as they return
_GATHERS = {"aten::index", "aten::index_select", "aten::embedding", "aten::gather", "aten::nll_loss_forward"}
# they change a tensor's shape in place, which `Watch` takes for a launch
_NO_BYTES = {"aten::as_strided_"}
# statistics of a whole batch come before what they are used for: each of the first tensors is read twice
_TWICE = {"aten::native_batch_norm": 1, "aten::native_batch_norm_backward": 2}
_HEAVY = re.compile(
    r"norm|softmax|gelu|silu|sigmoid|tanh|^(exp|log|erf|pow|r?sqrt|div|var_mean)$|_fused_adam|upsample|_kernel$"
)


def distinct_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's elements, those of a broadcast dimension once."""
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or size == 0]
    return math.prod(sizes) * tensor.element_size()


def tensors_of(tree: Any) -> list[torch.Tensor]:
    """The distinct tensors of a tree: views of the same elements of the same memory count once."""
    found = {}
    for tensor in tree_leaves(tree):
        if isinstance(tensor, torch.Tensor):
            place = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride())
            found.setdefault(place, tensor)
    return list(found.values())


def total_bytes(tree: Any) -> int:
    """Bytes of the distinct tensors of a tree."""
    return sum(distinct_bytes(tensor) for tensor in tensors_of(tree))


def shape_text(tensors: Sequence[torch.Tensor]) -> str:
    """Shapes and types in short, such as `128x64 bf16, 64 f32`, those of the two largest."""
    short = {"bfloat16": "bf16", "float16": "f16", "float32": "f32", "float64": "f64", "int64": "i64", "bool": "b8"}
    largest = sorted(tensors, key=lambda t: -t.numel())[:2]
    names = [str(t.dtype).removeprefix("torch.") for t in largest]
    return ", ".join(
        f"{'x'.join(map(str, t.shape)) or '1'} {short.get(n, n)}" for t, n in zip(largest, names, strict=True)
    )


def is_product(func: Any) -> bool:
    """Whether PyTorch's counter has a formula for an operator: matrix products, convolutions, attention."""
    return getattr(func, "_overloadpacket", None) in flop_registry


def unit_of(func: Any, dtype: torch.dtype) -> str:
    """What computes a product: PyTorch lets cuDNN's convolutions take TF32, and no matrix product."""
    if dtype in (torch.bfloat16, torch.float16):
        return "half"
    return "tf32" if "convolution" in func._schema.name else "fp32"


def kernel(op: str, read: Any, written: Any, **more: Any) -> Kernel:
    """One kernel that reads and writes trees of tensors; `more` are further fields."""
    inputs, outputs = tensors_of(read), tensors_of(written)
    found: Kernel = {
        "op": op.removeprefix("aten::"),
        "shape": shape_text(inputs or outputs),
        "part": "",
        "read": sum(map(distinct_bytes, inputs)),
        "written": sum(map(distinct_bytes, outputs)),
        "flop": 0,
        "unit": "fp32",
        "must": None,
        "kernels": 1,
        "launches": 1,
        "waits": False,
    }
    return found | more  # type: ignore[return-value]


def kernels_of(func: Any, args: Any, kwargs: dict, out: Any, count: int = 1) -> list[Kernel]:
    """The kernels of one call of an operator, with the bytes and FLOP of each.

    Args:
        func: Overload of an operator.
        args, kwargs: Its arguments.
        out: What it returned, or a tuple of the tensors in it.
        count: Kernels of an operator on lists of tensors.

    Returns:
        One kernel; of a convolution's backward one for each gradient, of which the first has the launch.
    """
    name = func._schema.name
    if name == "aten::convolution_backward":
        return _convolution_backward(func, args, out)
    schema = func._schema.arguments
    given = {a.name: value for a, value in zip(schema, args, strict=False)} | kwargs
    writes = [a.name for a in schema if a.alias_info is not None and a.alias_info.is_write and a.name in given]
    blind = {a.name for a in schema if a.name in writes and (a.kwarg_only or name in _OVERWRITES)}
    read = [] if name in _FILLS else [value for key, value in given.items() if key not in blind]
    written = [out, [given[key] for key in writes]]
    if name in _NO_BYTES:
        read = written = []
    found = kernel(name, read, written, kernels=count, launches=count)
    if name in _GATHERS:
        found["read"] += min(distinct_bytes(args[0]), total_bytes(out)) - distinct_bytes(args[0])
    # not in an evaluation, whose statistics are known
    if name in _TWICE and any(value is True for value in args):
        found["read"] += sum(map(distinct_bytes, args[: _TWICE[name]]))
    if is_product(func):
        first = next(t for t in tree_leaves(args) if isinstance(t, torch.Tensor))
        found["flop"] = int(flop_registry[func._overloadpacket](*args, **kwargs, out_val=out))
        found["unit"] = unit_of(func, first.dtype)
        # a mask or a bias of the scores is the same in every step, and could be computed where it is needed
        found["must"] = found["read"] + found["written"] - total_bytes(given.get("attn_bias"))
    else:
        found["flop"] = point_flop(name, [*tensors_of(read), *tensors_of(written)])
    return [found]


def point_flop(name: str, tensors: Sequence[torch.Tensor]) -> int:
    """FLOP of an operator without a formula: some for each element of its largest tensor."""
    each = HEAVY_FLOP if _HEAVY.search(name.removeprefix("aten::")) else LIGHT_FLOP
    if name.startswith(("aten::_foreach", "aten::_fused")):
        return each * sum(t.numel() for t in tensors)
    return each * max((t.numel() for t in tensors), default=0)


def _convolution_backward(func: Any, args: Any, out: Any) -> list[Kernel]:
    grad, image, weight, *_, wanted = args
    unit, formula = unit_of(func, image.dtype), flop_registry[func._overloadpacket]
    found: list[Kernel] = []
    gradients = iter([gradient for gradient in out if gradient is not None])
    for index, (what, read) in enumerate((("input", [grad, weight]), ("weight", [grad, image]), ("bias", [grad]))):
        if not wanted[index]:
            continue
        gradient = next(gradients)
        one = kernel(f"convolution_backward {what}", read, gradient)
        if what == "bias":
            one["flop"] = grad.numel()
        else:
            only = [i == index for i in range(3)]
            one["flop"] = int(formula(*args[:-1], only, out_val=tuple(gradient if chosen else None for chosen in only)))
            one |= {"unit": unit, "must": one["read"] + one["written"]}
        one["launches"] = 0 if found else 1
        found.append(one)
    return found
