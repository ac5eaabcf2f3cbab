"""Stands in for Triton's kernels: their launchers run as on a GPU, and each launch is counted and looked at."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from fake_cuda.count import Watch


class _Kernel:
    def __init__(self, name: str, watch: Watch) -> None:
        self.name, self.watch = name, watch

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **_: Any) -> None:
            devices = {arg.device for arg in args if isinstance(arg, torch.Tensor)}
            current = torch.device("cuda", torch.cuda.current_device())
            if devices != {current}:
                raise RuntimeError(
                    f"{self.name} is launched on {current}, and its tensors are on {sorted(map(str, devices))}"
                )
            self.watch.kernel(self.name, args)

        return launch


def count_kernels(watch: Watch, kernels: ModuleType) -> None:
    """Replaces the kernels of a module, its attributes `*_kernel`, by stand-ins that `watch` counts.

    Raises:
        RuntimeError: In a launch, where a tensor is not on the device that is current, to which Triton would launch.
    """
    for kernel in [k for k in vars(kernels) if k.endswith("_kernel")]:
        setattr(kernels, kernel, _Kernel(kernel, watch))


def run_own_operators(watch: Watch, operators: ModuleType, kernels: ModuleType, name: str) -> None:
    """Has `watch` run the launchers of an operator and of its backward, with stand-ins for the kernels.

    Args:
        watch: What counts.
        operators: A module with `_triton_forward` and `_triton_backward`.
        kernels: The module of the kernels that they launch, see `count_kernels`.
        name: The operator, such as `scalekd_ds::dual_view`; `NAME_backward` is its backward.

    Raises:
        RuntimeError: In a launch, where a tensor is not on the device that is current, to which Triton would launch.
    """
    count_kernels(watch, kernels)
    watch.run_launcher(name, operators._triton_forward)
    watch.run_launcher(f"{name}_backward", operators._triton_backward)
