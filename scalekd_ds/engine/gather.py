"""Whole tensors out of ZeRO's shards, and what ranks average among them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import nn

from scalekd_ds.distiller import ScaleKD
from scalekd_ds.engine.host_copies import HostCopies


@torch.no_grad()
def synchronise_buffers(module: nn.Module) -> None:
    """Makes BatchNorm's statistics the mean over ranks.

    ZeRO never communicates buffers: each rank's drift apart, and checkpoints keep rank 0's.
    """
    average_over_ranks([b for b in module.buffers() if b.is_floating_point() and b.numel()])


@torch.no_grad()
def average_over_ranks(buffers: list[torch.Tensor]) -> None:
    """Makes floating-point tensors their mean over ranks, in place, with one all-reduce."""
    if dist.get_world_size() == 1 or not buffers:
        return
    flat = torch.cat([b.flatten().float() for b in buffers])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for buffer, mean in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))


@torch.no_grad()
def student_state(distiller: ScaleKD, copies: HostCopies | None = None) -> dict[str, torch.Tensor]:
    """The student's whole state-dict on the CPU, from any ZeRO stage. Collective: every rank calls it.

    Buffers are this rank's: call `synchronise_buffers` first.

    Args:
        distiller: Of the engine.
        copies: The memory to copy into; fresh memory without it.
    """
    copies = copies or HostCopies()
    return {
        name: gathered(tensor, copies, name) for name, tensor in distiller.student.state_dict(keep_vars=True).items()
    }


@contextmanager
def _whole(tensor: torch.Tensor, **options: Any) -> Iterator[None]:
    """A parameter is whole in the block, and afterwards where it was before.

    The small parameters that ZeRO-3 keeps whole between steps are exact, and DeepSpeed's own context would leave them
    sharded: autocast's forward pass then fetches them rounded to 16 bits. A step after a save would differ from the same
    step after a resume.
    """
    if not hasattr(tensor, "ds_id"):
        yield
        return
    was_whole = tensor.ds_status is ZeroParamStatus.AVAILABLE
    with deepspeed.zero.GatheredParameters([tensor], **options):
        yield
    if was_whole and tensor.ds_status is not ZeroParamStatus.AVAILABLE:
        tensor.all_gather()


@torch.no_grad()
def gathered(tensor: torch.Tensor, copies: HostCopies | None = None, key: str = "") -> torch.Tensor:
    """A copy of a whole parameter or buffer on the CPU; collective where ZeRO-3 shards it."""
    with _whole(tensor):
        return (copies or HostCopies())(key, tensor)


@torch.no_grad()
def overwrite(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Undoes `gathered`; collective where ZeRO-3 shards the parameter."""
    with _whole(tensor, modifier_rank=0):
        if not hasattr(tensor, "ds_id") or dist.get_rank() == 0:
            tensor.copy_(values)
