"""Chooses the placement of the teacher that fits into the GPUs of a run, for `run.teacher_placement auto`."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed import comm as dist

from scalekd_ds.config import RunConfig, TeacherPlacement
from scalekd_ds.engine.teacher_placement import PLACEMENTS
from scalekd_ds.teacher import Teacher


def planned_placement(
    teacher: Teacher, cfg: RunConfig, config: dict[str, Any], num_classes: int, device: torch.device
) -> TeacherPlacement:
    """The first of replica, sharded and offloaded that fits into the memory of this GPU by the memory plan; collective.

    Rank 0 chooses for all ranks. On CPUs the choice is always a replica, and so it is of a headless teacher: its last stage is
    a small part of what the plan measures, and is used at every step.

    Args:
        teacher: The teacher in its final dtype.
        cfg: The run.
        config: The DeepSpeed JSON of student and projectors, merged with the recipe.
        num_classes: Number of classes of the data.
        device: Device of this rank.
    """
    if device.type == "cpu" or teacher.headless:
        return "replica"
    chosen = torch.zeros(1, dtype=torch.int64, device=device)
    if dist.get_rank() == 0:
        total = torch.cuda.get_device_properties(device).total_memory
        chosen += PLACEMENTS.index(_first_that_fits(teacher, cfg, config, num_classes, total))
    dist.broadcast(chosen, 0)
    return PLACEMENTS[int(chosen)]


def _first_that_fits(
    teacher: Teacher, cfg: RunConfig, config: dict[str, Any], num_classes: int, total: int
) -> TeacherPlacement:
    # a plan takes seconds, and a teacher that is small beside the GPU's memory needs none
    if 8 * sum(p.nbytes for p in teacher.parameters()) < total:
        return "replica"
    from scalekd_ds.plan.choose import placement_that_fits

    return placement_that_fits(cfg, config, num_classes, dist.get_world_size(), total / 2**30)
