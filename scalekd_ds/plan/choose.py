"""Chooses ZeRO stage, teacher placement and micro batch: the fastest that fits, by the memory and throughput models."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from scalekd_ds.config import RunConfig, TeacherPlacement
from scalekd_ds.engine import ds_config
from scalekd_ds.engine.teacher_placement import PLACEMENTS
from scalekd_ds.errors import UserError
from scalekd_ds.plan.communication import Collective, collectives
from scalekd_ds.plan.measure import Measured, measure
from scalekd_ds.plan.memory import Layout, memory_parts
from scalekd_ds.plan.teacher_size import TeacherSize
from scalekd_ds.plan.throughput import Assumptions, StepTime, step_time

GIB = 2**30
# the simpler of two plans is taken unless the other is faster by this factor, about the error of the model
MARGIN = 1.05


@dataclass(frozen=True)
class Cluster:
    """The GPUs that are planned for.

    Attributes:
        gpus: Number of GPUs, with one rank on each.
        gpu_memory: Memory of one GPU in GiB.
        nodes_of: GPUs in a node.
    """

    gpus: int
    gpu_memory: float
    nodes_of: int = 8

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise UserError(f"--gpus is {self.gpus}: it must be at least 1.")
        if not 0.0 < self.gpu_memory < float("inf"):
            raise UserError(f"--gpu-memory is {self.gpu_memory}: it must be positive, in GiB.")
        if self.nodes_of < 1:
            raise UserError(f"--nodes-of is {self.nodes_of}: it must be at least 1 GPU in a node.")

    def room(self, assume: Assumptions) -> int:
        """Bytes of one GPU that a run can use."""
        usable = self.gpu_memory * (1.0 - assume.fragmentation) - assume.reserve_gib - assume.dali_gib
        return max(0, round(usable * GIB))

    def memory_for(self, num_bytes: int, assume: Assumptions) -> float:
        """Memory in GiB that a GPU must have for a run to use `num_bytes` of it."""
        return (num_bytes / GIB + assume.reserve_gib + assume.dali_gib) / (1.0 - assume.fragmentation)


@dataclass(frozen=True)
class Plan:
    """One way to run, with its memory and time.

    Attributes:
        layout: ZeRO stage, number of ranks and teacher placement.
        ds_config: Name of the DeepSpeed JSON.
        micro_batch: Images in a forward pass on one rank.
        accumulation: Micro batches in an optimizer step.
        largest_micro_batch: Largest micro batch that fits. `micro_batch` is the largest one up to it that divides a rank's
            share of the global batch.
        memory: Bytes on one rank by part.
        room: Bytes of a GPU that a run can use.
        sent: Transfers of one optimizer step.
        time: Seconds of one optimizer step by part.
        images_per_s: Training images per second of all ranks together.
        hours: Hours of the whole schedule, without evaluation and saving.
    """

    layout: Layout
    ds_config: str
    micro_batch: int
    accumulation: int
    largest_micro_batch: int
    memory: dict[str, int]
    room: int
    sent: list[Collective]
    time: StepTime
    images_per_s: float
    hours: float


def make_plan(
    cfg: RunConfig,
    cluster: Cluster,
    num_classes: int,
    train_images: int,
    assume: Assumptions,
    placement: TeacherPlacement | Literal["auto"] = "auto",
    stage: int | None = None,
    measured: Measured | None = None,
) -> tuple[Plan, list[Plan]]:
    """The plan to follow, and all plans that fit.

    Args:
        cfg: The run.
        cluster: The GPUs.
        num_classes: Classes of the run's data.
        train_images: Training images in an epoch.
        assume: The assumptions of the throughput model.
        placement: Teacher placement; `auto` tries all.
        stage: ZeRO stage; None tries all.
        measured: The measurements of the run, if there are any already.

    Raises:
        UserError: The models cannot be built, the ranks cannot share the global batch evenly, or no plan fits into the GPUs;
            the message has the smallest memory that would do.
    """
    config = ds_config.read(cfg.run.ds_config)
    cfg.batches(cluster.gpus)
    measured = measured or measure(cfg, num_classes, ds_config.autocast_dtype(config))
    plans, smallest = [], []
    for teacher_placement in PLACEMENTS if placement == "auto" else (placement,):
        if placement == "auto" and (
            (teacher_placement == "sharded" and cluster.gpus == 1)
            or (teacher_placement != "replica" and not measured.teacher.parameters)
        ):
            continue
        if teacher_placement == "offload" and host_bytes(measured.teacher, cluster) > assume.host_memory_gib * GIB:
            continue
        for zero_stage in range(4) if stage is None else (stage,):
            name = cfg.run.ds_config if ds_config.stage_of(config) == zero_stage else f"zero{zero_stage}"
            layout = Layout.of(ds_config.read(name), cluster.gpus, teacher_placement)
            smallest.append((sum(memory_parts(measured, cfg, layout, 1).values()), zero_stage, teacher_placement))
            plan = _plan_for(measured, cfg, cluster, layout, name, train_images, assume)
            if plan is not None:
                plans.append(plan)
    if plans:
        return _best(plans), plans
    if not smallest:
        on_host = host_bytes(measured.teacher, cluster) / GIB
        raise UserError(
            f"the teacher does not fit into a node's memory: {on_host:.0f} GiB on the host for "
            f"{cluster.nodes_of} ranks; set --assume.host_memory_gib or another --teacher-placement."
        )
    num_bytes, zero_stage, teacher_placement = min(smallest)
    teacher = f"{cfg.teacher} in a cache" if measured.read else cfg.teacher
    raise UserError(
        f"{cfg.student} with {teacher} fits into no GPU of {cluster.gpu_memory:g} GiB, whatever the stage: with one image "
        f"it takes {cluster.memory_for(num_bytes, assume):.1f} GiB at ZeRO {zero_stage}, teacher {teacher_placement}, "
        f"on {cluster.gpus} GPUs."
    )


def placement_that_fits(
    cfg: RunConfig, config: dict[str, Any], num_classes: int, world_size: int, gpu_memory: float
) -> TeacherPlacement:
    """The first teacher placement with which a run fits as it is configured, or the one of least memory if none fits.

    Args:
        cfg: The run, with its micro batch.
        config: The DeepSpeed JSON.
        num_classes: Classes of the run's data.
        world_size: Number of ranks.
        gpu_memory: Memory of one GPU in GiB.

    Raises:
        UserError: The models cannot be built, or the ranks cannot share the global batch evenly.
    """
    measured = measure(cfg, num_classes, ds_config.autocast_dtype(config))
    room = Cluster(world_size, gpu_memory).room(Assumptions())
    micro, _ = cfg.batches(world_size)
    for placement in PLACEMENTS:
        layout = Layout.of(config, world_size, placement)
        if sum(memory_parts(measured, cfg, layout, micro).values()) <= room:
            return placement
    return PLACEMENTS[-1]


def host_bytes(teacher: TeacherSize, cluster: Cluster) -> int:
    """Bytes of host memory that an offloaded teacher takes on a node: the shares of its ranks."""
    return -(-teacher.bytes * min(cluster.gpus, cluster.nodes_of) // cluster.gpus)


def _best(plans: list[Plan]) -> Plan:
    """The first plan, in order of simplicity, than which no other is faster by more than the margin."""
    fastest = max(plan.images_per_s for plan in plans)
    return next(plan for plan in plans if plan.images_per_s * MARGIN >= fastest)


def _plan_for(
    measured: Measured,
    cfg: RunConfig,
    cluster: Cluster,
    layout: Layout,
    name: str,
    train_images: int,
    assume: Assumptions,
) -> Plan | None:
    """The plan of a layout with the largest micro batch that fits; None if no image fits."""
    room, share = cluster.room(assume), cfg.global_batch_size // cluster.gpus
    largest = largest_micro_batch(measured, cfg, layout, room)
    if largest == 0:
        return None
    micro, accumulation = replace(cfg, micro_batch_size=min(largest, share)).batches(cluster.gpus)
    sent = collectives(measured, cfg, layout, accumulation)
    time = step_time(measured, cfg, layout, sent, micro, accumulation, assume, cluster.nodes_of)
    rate = cfg.global_batch_size / time.total
    return Plan(
        layout,
        name,
        micro,
        accumulation,
        largest,
        memory_parts(measured, cfg, layout, micro),
        room,
        sent,
        time,
        rate,
        cfg.schedule.epochs * train_images / rate / 3600,
    )


def largest_micro_batch(measured: Measured, cfg: RunConfig, layout: Layout, room: int) -> int:
    """Most images in a micro batch whose step fits into `room` bytes; 0 if not even one fits."""

    def fits(images: int) -> bool:
        return sum(memory_parts(measured, cfg, layout, images).values()) <= room

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
