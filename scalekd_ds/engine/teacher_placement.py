"""Places the frozen teacher: whole on every rank, or sharded over the ranks, on the device or in host memory."""

from __future__ import annotations

from typing import Any, TypeGuard, get_args

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from scalekd_ds.config import TeacherPlacement
from scalekd_ds.engine import ds_config
from scalekd_ds.teacher import Teacher

# in order of falling speed and memory
PLACEMENTS: tuple[TeacherPlacement, ...] = get_args(TeacherPlacement)
# name of the DeepSpeed JSON of each placement; a replica has no engine
CONFIGS: dict[TeacherPlacement, str] = {"sharded": "teacher_zero3", "offload": "teacher_offload"}


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The innermost members of ModuleLists and Sequentials, such as transformer blocks; else the model itself."""

    def repeats(module: nn.Module) -> TypeGuard[nn.ModuleList | nn.Sequential]:
        return isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 0

    blocks = [m for parent in model.modules() if repeats(parent) for m in parent]
    return [m for m in blocks if not any(map(repeats, m.modules()))] or [model]


def persistence_threshold(teacher: nn.Module) -> int:
    """Number of elements up to which ZeRO-3 keeps a parameter whole on every rank.

    These are norms, biases and bias tables, together about a hundredth of the model.
    """
    return max(p.numel() for p in teacher.parameters()) // 64


def persistent_parameters(teacher: Teacher) -> list[nn.Parameter]:
    """The parameters that every rank keeps whole: small ones, and those of the model's root module.

    Position embeddings and class tokens are read outside of any forward pass that ZeRO hooks, and so are the bias
    tables of a BEiT.
    """
    small = persistence_threshold(teacher)
    own = {id(p) for p in teacher.model.parameters(recurse=False)}
    return [p for p in teacher.parameters() if p.numel() <= small or id(p) in own]


def place_teacher(teacher: Teacher, placement: TeacherPlacement, device: torch.device) -> None:
    """Moves the teacher's weights, in place, to where the placement has them; collective unless it is a replica.

    Sharded weights belong to a DeepSpeed engine of their own, with ZeRO-3 and no optimizer. A parameter is gathered
    when its module runs, which it does for the targets, for the last stage and for the backward pass of the last stage,
    and is released afterwards. Two blocks are whole at a time: the one that runs and the next. All ranks then have to
    call the teacher the same number of times.

    Args:
        teacher: The teacher, on the CPU and in its final dtype.
        placement: `replica` for whole weights; `sharded` for 1/W of the weights on each of W ranks; `offload` for that
            share in host memory.
        device: Device of this rank.
    """
    # a headless teacher whose logits alone are used has no weights
    if placement == "replica" or not any(True for _ in teacher.parameters()):
        teacher.to(device)
        return
    config = ds_config.read(CONFIGS[placement])
    whole = persistent_parameters(teacher)
    kept = {id(p) for p in whole}
    block = max(sum(p.numel() for p in m.parameters() if id(p) not in kept) for m in blocks_of(teacher))
    config["zero_optimization"] |= {
        "stage3_param_persistence_threshold": persistence_threshold(teacher),
        # parameters are released at once, because they are next used a whole pass of the teacher later
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": block,
        "stage3_max_live_parameters": 2 * block,
    }
    # DeepSpeed demands a batch size, though it is not used without an optimizer
    engine, *_ = deepspeed.initialize(model=teacher, config=config | {"train_micro_batch_size_per_gpu": 1})
    # with the attributes that DeepSpeed gives it
    parameter: Any
    for parameter in whole:
        parameter.all_gather()
        # DeepSpeed ignores its own mark for such parameters, ds_persist, while it traces its first pass, but it never
        # releases a parameter that it takes for another module's
        parameter.ds_persist = parameter.is_external_param = True
    for buffer in teacher.buffers():
        # every rank has rank 0's weights now, and what was built from them has to follow
        dist.broadcast(buffer, 0)
    # the engine is kept, because its hooks vanish with it; in a tuple, so that it is not registered as a submodule
    teacher.engine = (engine,)


def held_bytes(teacher: Teacher) -> int:
    """Bytes of the teacher's weights on this rank at this moment: its share and the parameters that are gathered."""
    total = 0
    for parameter in teacher.parameters():
        total += parameter.data.nbytes
        if hasattr(parameter, "ds_tensor"):
            total += parameter.ds_tensor.nbytes
    return total
