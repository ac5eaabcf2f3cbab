"""Finds the scores of an attention that is not fused, which a fused one never writes to memory."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from roofline_parts.cost import Kernel, distinct_bytes

# the second is PyTorch's own where no fused attention takes the heads
_SOFTMAX = {"aten::_softmax", "aten::_safe_softmax", "aten::_softmax_backward_data"}
_PRODUCTS = {"aten::bmm", "aten::baddbmm"}


class Scores:
    """Follows the outputs of batched products to a softmax, forward and backward, and back into products.

    What lies between the two products of an attention is taken out of `must` of both: it is no traffic of the floor.

    Attributes:
        shapes: Shapes of the scores as the products see them.
    """

    def __init__(self) -> None:
        self.shapes: set[tuple[int, ...]] = set()
        self._scores: weakref.WeakSet = weakref.WeakSet()
        # storage -> the product that it comes from, through operations on the same number of elements
        self._made: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    def see(self, name: str, inputs: list[torch.Tensor], outputs: list[torch.Tensor], kernels: list[Kernel]) -> None:
        """Takes note of one operator: its name, its tensors, and the kernels that it was found to launch."""
        if name in _PRODUCTS:
            for tensor in inputs:
                if tensor.untyped_storage() in self._scores:
                    self._leave_out(kernels[0], tensor)
            self._made[outputs[0].untyped_storage()] = (kernels[0], outputs[0])
        elif name in _SOFTMAX and inputs[0].dim() > 2:
            for tensor in (*inputs, *outputs):
                product = self._made.pop(tensor.untyped_storage(), None)
                if product:
                    self._leave_out(*product)
                self._scores.add(tensor.untyped_storage())
        elif len(outputs) == 1:
            storage = outputs[0].untyped_storage()
            for tensor in inputs:
                if tensor.numel() != outputs[0].numel():
                    continue
                if tensor.untyped_storage() in self._scores:
                    self._scores.add(storage)
                product = self._made.get(tensor.untyped_storage())
                if product:
                    self._made[storage] = product

    def _leave_out(self, product: Kernel, tensor: torch.Tensor) -> None:
        product["must"] = (product["must"] or 0) - distinct_bytes(tensor)
        self.shapes.add(tuple(tensor.shape))

    def leave_out(self, product: Kernel, operands: Any) -> None:
        """Takes operands of the shapes of scores out of a product of a fused graph, which has no storages to follow."""
        for tensor in operands:
            if tuple(tensor.shape) in self.shapes:
                product["must"] = (product["must"] or 0) - distinct_bytes(tensor)
