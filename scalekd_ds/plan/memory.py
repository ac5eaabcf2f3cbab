"""Bytes on one rank by part, as DeepSpeed's engines allocate them; the formulas are tested against live engines.

Parameters are float32 (autocast lowers copies, not weights), so the optimizer's master weights are float32 too. P is all
trainable elements, A those of a group padded to a multiple of 2 W, W the ranks.

stage  parameters      gradients         optimizer                       buckets (r: reduce_bucket_size, d: dtypes sent)
0      4 P             4 P               moments of P                    none while activations live
1      4 A             4 P until sent    4 A/W master + moments of A/W   4 r d, twice with overlap_comm
2      4 A             4 A/W, and the    the same                        the same
                       layers on a cut
                       whole
3      shares of 4 P/W 4 P/W             the same                        r (4 + 2 under autocast), kept for the whole run
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from scalekd_ds.config import RunConfig, TeacherPlacement
from scalekd_ds.engine.ds_config import stage_of
from scalekd_ds.plan.measure import Layer, Measured

MOMENTS = {"sgd": 1, "adamw": 2, "lamb": 2}
FLOAT = 4
# AdamW and LAMB count their steps in a float32 of each tensor that they update
STEP_COUNTERS = {"sgd": 0, "adamw": 1, "lamb": 1}


@dataclass(frozen=True)
class Layout:
    """Where things lie.

    Attributes:
        stage: ZeRO stage of student and projectors.
        world_size: Ranks, W.
        placement: Of the frozen teacher.
        zero: The `zero_optimization` part of the DeepSpeed JSON.
    """

    stage: int
    world_size: int
    placement: TeacherPlacement
    zero: DeepSpeedZeroConfig

    @classmethod
    def of(cls, ds_config: dict[str, Any], world_size: int, placement: TeacherPlacement) -> Layout:
        zero = DeepSpeedZeroConfig(**ds_config.get("zero_optimization", {}))
        return cls(stage_of(ds_config), world_size, placement, zero)


def padded(measured: Measured, world_size: int) -> list[int]:
    """Elements of each optimizer group as ZeRO 1 and 2 lay it out: a multiple of twice the ranks."""
    alignment = 2 * world_size
    return [math.ceil(sum(layer.numel for layer in group) / alignment) * alignment for group in measured.groups]


def kept_by_a_rank(measured: Measured, world_size: int) -> int:
    """Elements of the gradients that ZeRO-2 keeps on the fullest rank: a layer that lies across a cut stays whole on both."""
    kept = [0] * world_size
    for group, elements in zip(measured.groups, padded(measured, world_size), strict=True):
        part, start = elements // world_size, 0
        for layer in group:
            for rank in range(start // part, (start + layer.numel - 1) // part + 1):
                kept[rank] += layer.numel
            start += layer.numel
        # the last rank pads its part with zeros
        kept[-1] += elements - start
    return max(kept)


def held(layer: Layer, world_size: int) -> int:
    """Elements of a rank's share of one parameter under ZeRO-3."""
    return math.ceil(layer.numel / world_size)


def persistent(layer: Layer, layout: Layout) -> bool:
    """ZeRO-3 leaves a small parameter whole on every rank."""
    return layer.numel <= layout.zero.param_persistence_threshold


def comm_bytes(layer: Layer) -> int:
    """Bytes of one element when DeepSpeed sends it."""
    return 2 if layer.low else FLOAT


def memory_parts(measured: Measured, cfg: RunConfig, layout: Layout, micro_batch: int) -> dict[str, int]:
    """Bytes on one rank at the fullest moment of a step, by part.

    Args:
        measured: The pair, counted.
        cfg: The run: its optimizer, its moving average, its loader.
        layout: ZeRO stage, ranks, teacher's place.
        micro_batch: Images in a forward pass.

    Returns:
        `parameters`, `gradients`, `optimizer`, `average` (the student's moving average), `teacher`, `activations` (what
        autograd saves), `temporary` (what a step needs beside them), `buckets` (ZeRO's), `gathered` (whole parameters
        under ZeRO-3), `images` (the loader's batches), `buffers` (statistics), `evaluation` (an unsharded student under
        ZeRO-3).
    """
    w, stage, layers = layout.world_size, layout.stage, measured.layers
    elements, aligned = measured.numel, sum(padded(measured, w))
    shares = sum(held(layer, w) for layer in layers)
    updated = {0: elements, 1: aligned // w, 2: aligned // w, 3: shares}[stage]
    tensors = len(layers) if stage == 0 else len(measured.groups)
    master = 0 if stage == 0 else FLOAT * updated
    saved = measured.saved(micro_batch)
    peak = max(saved, measured.peak(micro_batch))
    student = sum(layer.numel for layer in layers if layer.student)
    image = 3 * cfg.data.image_size**2 * FLOAT * micro_batch
    return {
        "parameters": FLOAT * {0: elements, 1: aligned, 2: aligned, 3: shares}[stage],
        "gradients": FLOAT * {0: elements, 1: elements, 2: kept_by_a_rank(measured, w), 3: shares}[stage],
        "optimizer": master
        + MOMENTS[cfg.optim.name] * FLOAT * updated
        + STEP_COUNTERS[cfg.optim.name] * FLOAT * tensors,
        "average": FLOAT * math.ceil(student / w) if cfg.ema.decay else 0,
        "teacher": teacher_bytes(measured, layout),
        "activations": saved,
        "temporary": peak - saved,
        "buckets": bucket_bytes(measured, layout),
        "gathered": gathered_bytes(measured, layout),
        "images": image * cfg.data.prefetch,
        "buffers": measured.buffers,
        "evaluation": FLOAT * student if stage == 3 else 0,
    }


def teacher_bytes(measured: Measured, layout: Layout) -> int:
    """The teacher's bytes on one rank; sharded or offloaded, two blocks are whole at a time: the one that runs and the next."""
    teacher = measured.teacher
    if layout.placement == "replica" or not teacher.parameters:
        return teacher.bytes + teacher.buffers
    whole = teacher.kept_whole + min(2 * teacher.block, teacher.bytes)
    if layout.placement == "offload":
        return teacher.buffers + whole
    shares = sum(math.ceil(numel / layout.world_size) * size for numel, size in teacher.parameters)
    return teacher.buffers + shares + whole


def bucket_bytes(measured: Measured, layout: Layout) -> int:
    """ZeRO's reduce buckets, which are as large as the JSON says, however small the model."""
    size, kinds = layout.zero.reduce_bucket_size, {comm_bytes(layer) for layer in measured.layers}
    if layout.stage == 0 or not layout.zero.contiguous_gradients:
        return 0
    if layout.stage == 3:
        return size * sum(kinds)
    # float32 whatever is sent
    return size * FLOAT * len(kinds) * (2 if layout.zero.overlap_comm else 1)


def gathered_bytes(measured: Measured, layout: Layout) -> int:
    """Whole parameters on one rank under ZeRO-3: the small ones always, of the others as many as it lets live at once."""
    if layout.stage < 3:
        return 0
    # sent in 16 bits under autocast, and made float32 again on arrival
    small = sum(layer.numel for layer in measured.layers if persistent(layer, layout))
    return FLOAT * (small + min(measured.numel - small, layout.zero.max_live_parameters))
