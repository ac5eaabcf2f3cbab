"""Writes down every kernel of a step that runs on fake CUDA tensors."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from fake_cuda import Watch
from torch.utils._pytree import tree_leaves

from roofline_parts.cost import Kernel, kernel, kernels_of, point_flop, tensors_of
from roofline_parts.scores import Scores

BACKWARD = "backward"


class Trace(Watch):
    """Counts as `Watch` does, and lists the kernels in their order.

    A kernel of the backward pass belongs to the part in which its forward operator ran, and is called `backward PART`: every
    node of autograd's graph has a number that grows with the order of the forward pass.

    Attributes:
        kernels: What ran, in its order.
        scores: What is known of attentions that are not fused.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []
        self.scores = Scores()
        # the number of autograd's next node where a part begins -> the part
        self._from: list[tuple[int, str]] = []
        self._last_backward = BACKWARD

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """As that of `Watch`."""
        outer = self._part
        with super().part(name):
            self._from.append((torch.autograd._get_sequence_nr(), name))
            try:
                yield
            finally:
                self._from.append((torch.autograd._get_sequence_nr(), outer))

    def kernel(self, name: str, tensors: Any = ()) -> None:
        """Writes down a kernel of our own, whose every tensor is read or written once."""
        super().kernel(name, tensors)
        found = kernel(name, tensors, ())
        found["flop"] = point_flop("norm", tensors_of(tensors))
        found["must"] = found["read"]
        self._add([found])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict | None = None) -> Any:
        waits = sum(self.syncs.values())
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if sum(self.syncs.values()) > waits and self.kernels:
            self.kernels[-1]["waits"] = True
        return out

    def _count(self, func: Any, name: str, args: Any, kwargs: dict, outputs: list) -> None:
        before = sum(self.launches.values())
        super()._count(func, name, args, kwargs, outputs)
        count = sum(self.launches.values()) - before
        if not count:
            return
        is_one = len(outputs) == 1 and len(func._schema.returns) == 1
        kernels = kernels_of(func, args, kwargs, outputs[0] if is_one else tuple(outputs), count)
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        self.scores.see(name, inputs, outputs, kernels)
        self._add(kernels)

    def _add(self, kernels: list[Kernel]) -> None:
        part = self._part
        if part == BACKWARD:
            part = self._forward_part()
        for found in kernels:
            found["part"] = part
        self.kernels += kernels

    def _forward_part(self) -> str:
        node = torch._C._current_autograd_node()
        # a node that adds a gradient up has no number of its own, and follows the one that made the gradient
        if node is not None and node._sequence_nr() < 1 << 62:
            index = bisect.bisect_right(self._from, node._sequence_nr(), key=lambda entry: entry[0]) - 1
            forward = self._from[max(index, 0)][1] if self._from else BACKWARD
            # the loss is divided within the backward pass
            self._last_backward = forward if forward == BACKWARD else f"{BACKWARD} {forward}"
        return self._last_backward


def traced(call: Callable[..., Any], *args: Any) -> Trace:
    """The trace of one call, inside of `fake_cuda.tensors`."""
    with Trace() as trace:
        call(*args)
    return trace
