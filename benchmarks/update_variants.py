"""The ways to make LAMB's update that `kernels.py` measures: PyTorch's operations and the kernels, on layers and on a shard."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any
from unittest import mock

import shapes
import torch

from scalekd_ds.engine.zero_layout import Segment, Shard
from scalekd_ds.kernels.lamb import table
from scalekd_ds.optim import lamb

# a learning rate with which the weights of many rounds stay near their first ones
_LR = 1e-5


class _Whole(lamb.Lamb):
    """LAMB of one rank that holds all of a flat shard."""

    def _is_sharded(self) -> bool:
        return True

    def _is_divided(self) -> bool:
        return False


def _optimizer(update: shapes.Update, weights: list[torch.Tensor]) -> lamb.Lamb:
    if not update.flat:
        return lamb.Lamb(weights, lr=_LR)
    optimizer, (flat,) = _Whole(weights, lr=_LR), weights
    layers = [torch.empty(shape, device="meta") for shape in update.layers]
    counts = [layer.numel() for layer in layers]
    segments = [Segment(i, end - n, n, 0) for i, (n, end) in enumerate(zip(counts, accumulate(counts), strict=True))]
    optimizer._shards = {id(flat): Shard(flat, layers, segments)}
    return optimizer


def update_calls(
    update: shapes.Update, batch: int, dtype: torch.dtype, device: torch.device, compiled: bool
) -> dict[str, tuple[Callable[[], None], list[torch.Tensor]]]:
    """The variants by name: `library` as the table has it, and each way alone; all on the same weights and gradients.

    Batch and type are those of other shapes: an update is of float32 weights.
    """
    shapes = [(update.parameters(),)] if update.flat else update.layers
    weights = [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
    for weight in weights:
        weight.grad = torch.randn_like(weight)

    def stepping(runs_triton: bool | None) -> Callable[[], None]:
        optimizer = _optimizer(update, weights)

        def step() -> None:
            if runs_triton is None:
                optimizer.step()
                return
            with mock.patch.object(lamb, "runs_triton", return_value=runs_triton):
                optimizer.step()

        return step

    ways = {"library": None, "torch": False} | ({"triton": True} if device.type == "cuda" else {})
    return {name: (stepping(way), []) for name, way in ways.items()}


def update_table(rows: list[dict[str, Any]], machine: dict[str, Any]) -> dict[str, str]:
    """Which of `triton` and `torch` is faster, by the keys of the library's table; the shapes of one key are summed."""
    sums: dict[str, list[float]] = {}
    for row in rows:
        measured = {name for name, variant in row["variants"].items() if "error" not in variant}
        if row.get("operation") != "lamb" or not {"triton", "torch"} <= measured:
            continue
        both = sums.setdefault(table.key_of(int(machine["sm"].replace(".", "")), row["sizes"]["flat"]), [0.0, 0.0])
        for i, name in enumerate(("triton", "torch")):
            both[i] += row["variants"][name]["median"]
    return {key: "triton" if triton < plain else "torch" for key, (triton, plain) in sums.items()}
