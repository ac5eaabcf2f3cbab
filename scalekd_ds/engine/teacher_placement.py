"""Where the frozen teacher's weights are: whole on every rank, or a share on each, on the device or in the host's memory."""

from __future__ import annotations

from typing import get_args

import deepspeed
import torch
from torch import nn

from scalekd_ds.config import TeacherPlacement
from scalekd_ds.engine import ds_config
from scalekd_ds.teacher import Teacher

# from the fastest to the one that takes the least memory
PLACEMENTS: tuple[TeacherPlacement, ...] = get_args(TeacherPlacement)
# the DeepSpeed JSON of each; a replica has no engine
CONFIGS: dict[TeacherPlacement, str] = {"sharded": "teacher_zero3", "offload": "teacher_offload"}


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The innermost parts that repeat: transformer blocks, and their like; the model itself where nothing does."""

    def repeats(module: nn.Module) -> bool:
        return isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 0

    blocks = [m for parent in model.modules() if repeats(parent) for m in parent]
    return [m for m in blocks if not any(map(repeats, m.modules()))] or [model]


def small_parameter(teacher: Teacher) -> int:
    """Elements up to which a parameter is not sharded: norms, biases and bias tables, a hundredth of the whole."""
    return max(p.numel() for p in teacher.parameters()) // 64


def kept_whole(teacher: Teacher) -> list[nn.Parameter]:
    """What every rank keeps whole: small parameters, and what the model itself owns.

    Position embeddings and class tokens are read outside of any forward that ZeRO watches, and so are a BEiT's bias tables.
    """
    small = small_parameter(teacher)
    own = {id(p) for p in teacher.model.parameters(recurse=False)}
    return [p for p in teacher.parameters() if p.numel() <= small or id(p) in own]


def place_teacher(teacher: Teacher, placement: TeacherPlacement, device: torch.device) -> None:
    """Moves the teacher to where it is to be; collective unless it is a replica.

    Sharded weights are an engine's of their own, with ZeRO-3 and no optimizer: a parameter is gathered when the module that
    owns it runs, for the targets, for the last stage and again for its backward pass, and given up behind it. Two blocks
    are whole at a time: the one that runs, and the next. All ranks then have to call the teacher the same number of times.

    Args:
        teacher: On the CPU, in the dtype that it is to have.
        placement: `replica`; `sharded`: 1/W of the weights on each of W ranks; `offload`: that share in the host's memory.
        device: Of this rank.
    """
    if placement == "replica":
        teacher.to(device)
        return
    config = ds_config.read(CONFIGS[placement])
    whole = kept_whole(teacher)
    kept = {id(p) for p in whole}
    block = max(sum(p.numel() for p in m.parameters() if id(p) not in kept) for m in blocks_of(teacher))
    config["zero_optimization"] |= {
        "stage3_param_persistence_threshold": small_parameter(teacher),
        # what has been used is given up at once: the next use is a whole pass of the teacher away
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": block,
        "stage3_max_live_parameters": 2 * block,
    }
    # DeepSpeed wants a batch size, and nothing reads it without an optimizer
    engine, *_ = deepspeed.initialize(model=teacher, config=config | {"train_micro_batch_size_per_gpu": 1})
    for parameter in whole:
        parameter.all_gather()
        # ds_persist, DeepSpeed's mark for this, does not hold while it records its first pass; what it takes for another
        # module's it never gives up
        parameter.ds_persist = parameter.is_external_param = True
    # its hooks go when it goes
    teacher.engine = (engine,)


def held_bytes(teacher: Teacher) -> int:
    """Bytes of the teacher's weights on this rank at this moment: its share, and what is gathered."""
    total = 0
    for parameter in teacher.parameters():
        total += parameter.data.nbytes
        if hasattr(parameter, "ds_tensor"):
            total += parameter.ds_tensor.nbytes
    return total
