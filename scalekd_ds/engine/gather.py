"""Gathers whole tensors from ZeRO's shards, and averages buffers over the ranks."""

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
    """Sets every floating-point buffer, such as BatchNorm's statistics, to its mean over the ranks; collective.

    ZeRO never communicates buffers, so those of the ranks drift apart, and a checkpoint keeps those of rank 0.
    """
    average_over_ranks([b for b in module.buffers() if b.is_floating_point() and b.numel()])


@torch.no_grad()
def average_over_ranks(buffers: list[torch.Tensor]) -> None:
    """Sets floating-point tensors to their mean over the ranks, in place, with one all-reduce; collective.

    A second call changes nothing, so it does not matter whether a checkpoint is saved before an evaluation or after it.
    """
    if dist.get_world_size() == 1 or not buffers:
        return
    # in float32 the mean of three equal numbers may be another one
    flat = torch.cat([b.flatten().double() for b in buffers])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for buffer, mean in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))


@torch.no_grad()
def student_state(
    distiller: ScaleKD, copies: HostCopies | None = None, is_kept: bool = True
) -> dict[str, torch.Tensor]:
    """The student's whole state dict on the CPU, from any ZeRO stage; collective.

    Buffers are those of this rank: call `synchronise_buffers` first.

    Args:
        distiller: The engine's module.
        copies: Host memory that is used again for the copies; None allocates new memory.
        is_kept: Whether this rank gets the state; without it, it only takes part, and gets an empty dict.
    """
    return gather_all(distiller.student.state_dict(keep_vars=True), copies, is_kept)


@torch.no_grad()
def gather_all(
    tensors: dict[str, torch.Tensor], copies: HostCopies | None = None, is_kept: bool = True, prefix: str = ""
) -> dict[str, torch.Tensor]:
    """Copies of whole parameters and buffers on the CPU by their names; collective where ZeRO-3 shards one.

    Args:
        tensors: Name -> parameter or buffer of the engine's module.
        copies: Host memory that is used again for the copies; None allocates new memory.
        is_kept: Whether this rank gets them; without it, it only takes part, and gets an empty dict.
        prefix: Put before the names in `copies`.
    """
    copies, found = copies or HostCopies(), {}
    for name, tensor in tensors.items():
        if is_kept:
            found[name] = gather_to_cpu(tensor, copies, f"{prefix}{name}")
        else:
            with _gathered_in_place(tensor):
                pass
    return found


@contextmanager
def _gathered_in_place(tensor: Any, **options: Any) -> Iterator[None]:
    """A context in which a parameter is whole; afterwards it is whole or sharded as it was before.

    DeepSpeed's own context would leave the small parameters sharded that ZeRO-3 keeps whole between steps. These are
    exact, but the next forward pass under autocast would fetch them rounded to 16 bits, and a step after a save would
    then differ from the same step after a resume.
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
def gather_to_cpu(tensor: torch.Tensor, copies: HostCopies | None = None, key: str = "") -> torch.Tensor:
    """A copy of a whole parameter or buffer on the CPU; collective where ZeRO-3 shards it.

    Args:
        tensor: Parameter or buffer of the engine's module.
        copies: Host memory that is used again for the copy; None allocates new memory.
        key: Name of the copy in `copies`.
    """
    with _gathered_in_place(tensor):
        return (copies or HostCopies())(key, tensor)


@torch.no_grad()
def overwrite(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Sets a whole parameter or buffer to `values` of its full shape; collective where ZeRO-3 shards the parameter."""
    with _gathered_in_place(tensor, modifier_rank=0):
        if not hasattr(tensor, "ds_id") or dist.get_rank() == 0:
            tensor.copy_(values)
