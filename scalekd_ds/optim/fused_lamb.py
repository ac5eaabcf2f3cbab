"""LAMB's step by the Triton kernels, on GPUs where they were measured to be faster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from scalekd_ds.kernels.lamb import blocks_of
from scalekd_ds.optim.layers import Cut

if TYPE_CHECKING:
    # Triton is imported where there is a GPU to use it
    from scalekd_ds.kernels.lamb.blocks import Blocks
    from scalekd_ds.kernels.lamb.launch import Addresses, Numbers


class Tables(NamedTuple):
    """What the kernels find the layers of a cut by.

    Attributes:
        cut: The cut.
        blocks: Its blocks.
        addresses: Of its tensors.
    """

    cut: Cut
    blocks: Blocks
    addresses: Addresses


class FusedUpdate(NamedTuple):
    """An update that is made again when it is applied, in place of a tensor of it.

    Attributes:
        tables: Of the cut.
        numbers: Of the step.
        partials: (blocks, 2), squared norms of the blocks of weights and of the update; empty without weight decay, where the
            weights are updated already.
    """

    tables: Tables
    numbers: Numbers
    partials: torch.Tensor


def tables_of(cut: Cut) -> Tables:
    """The tables of a cut, to be kept as long as the cut is."""
    from scalekd_ds.kernels.lamb.launch import Addresses

    device = cut.tensors[0].device
    return Tables(cut, blocks_of(cut.places, device), Addresses(device))


def begin(tables: Tables, moments: Sequence[Sequence[torch.Tensor]], step: int, group: dict[str, Any]) -> FusedUpdate:
    """Advances the moments of a cut's tensors, and without weight decay their weights.

    Args:
        tables: Of the cut.
        moments: First and second moments, as many as there are tensors.
        step: Number of this step, from 1.
        group: The parameter group.
    """
    from scalekd_ds.kernels.lamb import launch

    weights = tables.cut.tensors
    # a gradient in another layout is copied, and its copy lives until the kernels are launched
    grads = [weight.grad.contiguous() for weight in weights if weight.grad is not None]
    tables.addresses.update([grads, *moments, weights])
    numbers = launch.numbers_of(step, group["lr"], group["betas"], group["eps"], group["weight_decay"])
    return FusedUpdate(tables, numbers, launch.advance(tables.blocks, tables.addresses, numbers))


def add_squared_norms(squares: torch.Tensor, first: int, update: FusedUpdate) -> None:
    """Writes the squared norms of this rank's segments of each layer into `squares`, from the layer `first` on."""
    from scalekd_ds.kernels.lamb import launch

    launch.add_squares(update.tables.blocks, update.partials, squares, first)


def apply(update: FusedUpdate, ratios: torch.Tensor, first: int) -> None:
    """Updates the weights with their layers' trust ratios, which begin at `first` in `ratios`."""
    from scalekd_ds.kernels.lamb import launch

    launch.apply(update.tables.blocks, update.tables.addresses, update.numbers, ratios, first)
