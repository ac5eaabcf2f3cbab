"""Launches of Triton kernels, recorded instead of run: their arguments, and the device that was current."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from aot import Resources, aot


class Launch(NamedTuple):
    """One launch.

    Attributes:
        kernel: What was launched, a `JITFunction`.
        grid: Programs along each axis.
        arguments: All arguments by name, constants included.
        options: `num_warps`, `num_stages` and whatever else is no argument of the kernel.
        device: Index of the CUDA device that was current.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]
    device: int

    def strides(self) -> dict[str, int]:
        """The arguments that the kernel declares as int64."""
        names = [p.name for p in self.kernel.params if p.annotation_type == "i64"]
        return {name: self.arguments[name] for name in names}

    def compile(self, arch: int) -> Resources:
        """Compiles what this launch would compile on sm_`arch`."""
        types, constants, aligned = {}, {}, set()
        for parameter in self.kernel.params:
            name, value = parameter.name, self.arguments[parameter.name]
            if parameter.is_constexpr:
                constants[name] = value
            elif isinstance(value, torch.Tensor):
                types[name] = "*" + {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[value.dtype]
                if value.storage_offset() * value.element_size() % 16 == 0:
                    aligned.add(name)
            elif isinstance(value, float):
                types[name] = "fp32"
            elif value == 1:
                # Triton makes a constant of it
                constants[name] = 1
            else:
                types[name] = parameter.annotation_type or "i32"
                if value % 16 == 0:
                    aligned.add(name)
        stages = self.options.get("num_stages", 3)
        return aot(self.kernel, types, constants, self.options.get("num_warps", 4), arch, stages, aligned)


def record(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> list[Launch]:
    """Records the launches of all kernels of `module` from then on, where cuda:0 is current unless a guard changes it.

    Nothing is computed: tensors that a kernel would fill keep what `torch.empty` gave.
    """
    launches: list[Launch] = []
    current = [0]

    def exchange(device: int) -> int:
        before = current[0]
        if device >= 0:
            current[0] = device
        return before

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*args, **kwargs):
                names = self.kernel.arg_names
                arguments = dict(zip(names, args, strict=False)) | {n: v for n, v in kwargs.items() if n in names}
                assert set(arguments) == set(names), set(arguments) ^ set(names)
                options = {n: v for n, v in kwargs.items() if n not in names}
                launches.append(Launch(self.kernel, grid, arguments, options, current[0]))

            return launch

    monkeypatch.setattr(torch.cuda, "_exchange_device", exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", exchange)
    for name, kernel in list(vars(module).items()):
        if name.endswith("_kernel"):
            monkeypatch.setattr(module, name, Recorder(kernel))
    return launches
