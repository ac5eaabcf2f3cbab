"""Runs a script as on a GPU, on tensors without values: `run_script.py SCRIPT ARGUMENTS`, in a process of `environment`.

Every operation that launches moves a timeline, so that what the script times is positive and means nothing.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fake_cuda
from fake_cuda import events
from scalekd_ds.kernels.lamb import launch, triton_kernels


class Launches(TorchDispatchMode):
    """Every operation is a kernel of the timeline."""

    def __init__(self, timeline: events.Timeline) -> None:
        super().__init__()
        self.timeline = timeline

    def kernel(self, name: str, tensors: Any = ()) -> None:
        """A kernel that is no operator of PyTorch."""
        self.timeline.launch()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "cpu":
            # a number that the host has counted: any will do
            return 1
        self.timeline.launch()
        return func(*args, **(kwargs or {}))


def main() -> None:
    script = Path(sys.argv[1]).resolve()
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(script.parent))
    fake_cuda.pretend()
    with events.timed_by(events.Timeline()) as timeline, fake_cuda.tensors(), Launches(timeline) as launches:
        # of no operator that fake tensors know, on tensors that have no addresses
        fake_cuda.count_kernels(launches, triton_kernels)
        launch.addresses_of = lambda tensors: [0] * len(tensors)
        runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
