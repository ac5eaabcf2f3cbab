"""The update of a step whose LAMB runs on the library's kernels, as it does where they were measured to be faster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import fake_cuda
import torch
from fake_cuda.engine import make_state

from roofline_parts.cards import HEAVY_FLOP
from roofline_parts.cost import Kernel
from roofline_parts.trace import Trace
from scalekd_ds.distiller import ScaleKD
from scalekd_ds.kernels.lamb import launch, table, triton_kernels
from scalekd_ds.optim.lamb import Lamb

# float32 tensors of a layer's size that a pass reads, writes, and cannot do without: gradient, moments and weight, of which the
# first pass writes the moments, and the weight where there is no trust ratio; the second one reads what the first one had
_READ, _WRITTEN, _MUST = {"advance": 4, "apply": 3}, {"advance": 2, "apply": 1}, {"advance": 6, "apply": 1}


class _Everything(dict):
    """A table in which the kernels were measured to be the faster ones."""

    def get(self, key: str, default: Any = None) -> str:
        return "triton"


@contextmanager
def _on_kernels(trace: Trace) -> Iterator[None]:
    """Within, LAMB runs on its kernels, whose bytes are those of all their blocks: pointers do not tell them."""

    def passing(name: str, call: Any) -> Any:
        def counted(blocks: Any, addresses: Any, numbers: Any, *more: Any) -> Any:
            before = len(trace.kernels)
            answer = call(blocks, addresses, numbers, *more)
            one = 4 * blocks.elements
            moves = name == "advance" and numbers.weight_decay == 0.0
            for found in trace.kernels[before:]:
                if found["op"] == f"{name}_kernel":
                    found["read"] += one * _READ[name]
                    found["written"] += one * (_WRITTEN[name] + moves)
                    found["must"] = one * (_MUST[name] + moves)
                    found["flop"] = HEAVY_FLOP * blocks.elements
                    found["shape"] = f"{blocks.elements} f32"
            return answer

        return counted

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(table, "measured", _Everything))
        # tensors without values have no addresses
        stack.enter_context(mock.patch.object(launch, "addresses_of", lambda tensors: [0] * len(tensors)))
        for name in ("advance", "apply"):
            stack.enter_context(mock.patch.object(launch, name, passing(name, getattr(launch, name))))
        yield


def trace_update(distiller: ScaleKD, optimizer: Any, ema: Any) -> list[Kernel] | None:
    """The kernels of the check of the gradients, LAMB and the average; None for other optimizers.

    Args:
        distiller: With fake tensors of the GPU; inside of `fake_cuda.tensors`.
        optimizer: With its state, after the eager step.
        ema: The average.
    """
    if not isinstance(optimizer, Lamb):
        return None
    trace = Trace()
    fake_cuda.count_kernels(trace, triton_kernels)
    with _on_kernels(trace):
        with fake_cuda.Watch():
            # the first step on the kernels makes what later ones find
            make_state(distiller, optimizer, ema)
            # a run has it by then, and the check takes it
            optimizer.grad_norm = torch.zeros((), device=next(distiller.parameters()).device)
        trace.kernels.clear()
        with trace, trace.part("optimizer"):
            make_state(distiller, optimizer, ema)
    return trace.kernels
