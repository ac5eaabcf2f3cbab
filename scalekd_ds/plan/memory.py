"""Bytes on one rank by part, as DeepSpeed's engines allocate them; tests compare the formulas with real engines.

Parameters are float32 (autocast casts copies of them), and so are the optimizer's master weights. W is the number of ranks,
P that of all trainable elements, and A the sum over optimizer groups, each padded to a multiple of 2 W elements.

stage  parameters      gradients         optimizer                       buckets (r: reduce_bucket_size, d: dtypes sent)
0      4 P             4 P               moments of P                    none while activations live
1      4 A             4 P until sent    4 A/W master + moments of A/W   4 r d, twice with overlap_comm
2      4 A             4 A/W, and the    the same                        the same
                       layers across
                       parts whole
3      shares of 4 P/W 4 P/W             the same                        r (4 + 2 under autocast), kept for the whole run
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from scalekd_ds.config import RunConfig, TeacherPlacement
from scalekd_ds.engine.ds_config import stage_of
from scalekd_ds.plan.measure import Measured, TrainableParameter

# tensors of optimizer state for each parameter
MOMENTS = {"sgd": 1, "adamw": 2, "lamb": 2}
# bytes of a float32
FLOAT = 4
# AdamW and LAMB hold a float32 step counter for each tensor that they update
STEP_COUNTERS = {"sgd": 0, "adamw": 1, "lamb": 1}


@dataclass(frozen=True)
class Layout:
    """How a run is distributed over its ranks.

    Attributes:
        stage: ZeRO stage of student and projectors.
        world_size: Number of ranks.
        placement: Placement of the frozen teacher.
        zero: The `zero_optimization` part of the DeepSpeed JSON.
    """

    stage: int
    world_size: int
    placement: TeacherPlacement
    zero: DeepSpeedZeroConfig

    @classmethod
    def of(cls, ds_config: dict[str, Any], world_size: int, placement: TeacherPlacement) -> Layout:
        """The layout of a DeepSpeed JSON."""
        zero = DeepSpeedZeroConfig(**ds_config.get("zero_optimization", {}))
        return cls(stage_of(ds_config), world_size, placement, zero)


def padded_group_numels(measured: Measured, world_size: int) -> list[int]:
    """Elements of each optimizer group, padded as ZeRO 1 and 2 do to a multiple of twice the number of ranks."""
    alignment = 2 * world_size
    return [math.ceil(sum(p.numel for p in group) / alignment) * alignment for group in measured.groups]


def zero2_gradient_numel(measured: Measured, world_size: int) -> int:
    """Elements of the gradients that ZeRO-2 keeps on the rank that keeps most.

    Both ranks keep the whole gradient of a parameter that lies across the border of their parts.
    """
    kept = [0] * world_size
    for group, elements in zip(measured.groups, padded_group_numels(measured, world_size), strict=True):
        part, start = elements // world_size, 0
        for parameter in group:
            for rank in range(start // part, (start + parameter.numel - 1) // part + 1):
                kept[rank] += parameter.numel
            start += parameter.numel
        # the last rank pads its part with zeros
        kept[-1] += elements - start
    return max(kept)


def shard_numel(parameter: TrainableParameter, world_size: int) -> int:
    """Elements of a rank's shard of one parameter under ZeRO-3."""
    return math.ceil(parameter.numel / world_size)


def is_persistent(parameter: TrainableParameter, layout: Layout) -> bool:
    """Whether a parameter is so small that ZeRO-3 keeps it whole on every rank."""
    return parameter.numel <= layout.zero.param_persistence_threshold


def sent_element_bytes(parameter: TrainableParameter) -> int:
    """Bytes of one element of a parameter when DeepSpeed sends it."""
    return 2 if parameter.sent_in_16_bits else FLOAT


def memory_parts(measured: Measured, cfg: RunConfig, layout: Layout, micro_batch: int) -> dict[str, int]:
    """Bytes on one rank when a step needs most, by part.

    Args:
        measured: The measurements of the run.
        cfg: The run, of which the optimizer, the moving average and the loader count.
        layout: ZeRO stage, number of ranks and teacher placement.
        micro_batch: Images in a forward pass.

    Returns:
        `parameters`, `gradients`, `optimizer`, `average` (the student's moving average), `teacher`, `activations` (what
        autograd saves), `temporary` (what a step needs besides), `buckets` (those of ZeRO), `gathered` (whole parameters
        under ZeRO-3), `images` (the loader's batches), `buffers` (such as BatchNorm's statistics), `evaluation` (an
        unsharded student under ZeRO-3).
    """
    w, stage, parameters = layout.world_size, layout.stage, measured.parameters
    elements, padded = measured.numel, sum(padded_group_numels(measured, w))
    shards = sum(shard_numel(p, w) for p in parameters)
    updated = {0: elements, 1: padded // w, 2: padded // w, 3: shards}[stage]
    tensors = len(parameters) if stage == 0 else len(measured.groups)
    master = 0 if stage == 0 else FLOAT * updated
    saved = measured.saved(micro_batch)
    peak = max(saved, measured.peak(micro_batch))
    student = sum(p.numel for p in parameters if p.of_student)
    return {
        "parameters": FLOAT * {0: elements, 1: padded, 2: padded, 3: shards}[stage],
        "gradients": FLOAT * {0: elements, 1: elements, 2: zero2_gradient_numel(measured, w), 3: shards}[stage],
        "optimizer": master
        + MOMENTS[cfg.optim.name] * FLOAT * updated
        + STEP_COUNTERS[cfg.optim.name] * FLOAT * tensors,
        "average": FLOAT * math.ceil(student / w) if cfg.ema.decay else 0,
        "teacher": teacher_bytes(measured, layout),
        "activations": saved,
        "temporary": peak - saved,
        "buckets": bucket_bytes(measured, layout),
        "gathered": gathered_bytes(measured, layout),
        "images": image_bytes(cfg, micro_batch),
        "buffers": measured.buffers,
        "evaluation": FLOAT * student if stage == 3 else 0,
    }


def image_bytes(cfg: RunConfig, micro_batch: int) -> int:
    """Bytes of the batches that the loader holds ready."""
    return 3 * cfg.data.image_size**2 * FLOAT * micro_batch * cfg.data.prefetch


def teacher_bytes(measured: Measured, layout: Layout) -> int:
    """The teacher's bytes on one rank.

    If it is sharded or offloaded, two blocks are whole at a time: the one that runs and the next one.
    """
    teacher = measured.teacher
    if layout.placement == "replica" or not teacher.parameters:
        return teacher.bytes + teacher.buffers
    whole = teacher.kept_whole + min(2 * teacher.block, teacher.bytes)
    if layout.placement == "offload":
        return teacher.buffers + whole
    shards = sum(math.ceil(numel / layout.world_size) * size for numel, size in teacher.parameters)
    return teacher.buffers + shards + whole


def bucket_bytes(measured: Measured, layout: Layout) -> int:
    """Bytes of ZeRO's reduce buckets, which are as large as the JSON says, however small the model is."""
    size, widths = layout.zero.reduce_bucket_size, {sent_element_bytes(p) for p in measured.parameters}
    if layout.stage == 0 or not layout.zero.contiguous_gradients:
        return 0
    if layout.stage == 3:
        return size * sum(widths)
    # a bucket for each type that is sent, but all of them are allocated in float32
    return size * FLOAT * len(widths) * (2 if layout.zero.overlap_comm else 1)


def gathered_bytes(measured: Measured, layout: Layout) -> int:
    """Bytes of whole parameters on one rank under ZeRO-3: all small ones, and `max_live_parameters` of the others at most."""
    if layout.stage < 3:
        return 0
    # also under autocast, where they are sent in 16 bits and then cast to float32
    small = sum(p.numel for p in measured.parameters if is_persistent(p, layout))
    return FLOAT * (small + min(measured.numel - small, layout.zero.max_live_parameters))
