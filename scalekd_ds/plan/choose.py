"""Which ZeRO stage, which place for the teacher and which micro batch: the fastest by the model that fits."""

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
from scalekd_ds.plan.throughput import Assumptions, StepTime, step_time

GIB = 2**30
# what is simpler wins unless the other is faster by more than the model can tell
MARGIN = 1.05


@dataclass(frozen=True)
class Cluster:
    """The GPUs that are planned for.

    Attributes:
        gpus: Ranks.
        gpu_memory: Of one, in GiB.
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
        """Bytes of one GPU that are ours."""
        usable = self.gpu_memory * (1.0 - assume.fragmentation) - assume.reserve_gib - assume.dali_gib
        return max(0, round(usable * GIB))

    def memory_for(self, count: int, assume: Assumptions) -> float:
        """GiB of a GPU that has `count` bytes of room."""
        return (count / GIB + assume.reserve_gib + assume.dali_gib) / (1.0 - assume.fragmentation)


@dataclass(frozen=True)
class Plan:
    """One way to run, and what it takes.

    Attributes:
        layout: ZeRO stage, ranks, teacher's place.
        ds_config: Name of the DeepSpeed JSON.
        micro_batch: Images in a forward pass on one rank.
        accumulation: Micro batches in an optimizer step.
        largest_micro_batch: That fits; the run takes the largest one up to it that divides its share of the global batch.
        memory: Bytes on one rank by part.
        room: Bytes of a GPU that are ours.
        sent: Transfers of one optimizer step.
        time: Of one optimizer step.
        images_per_s: Over all ranks.
        hours: Of the whole schedule, without evaluation and saving.
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
    """The plan to follow, and all that fit.

    Args:
        cfg: The run.
        cluster: Its GPUs.
        num_classes: Classes of its data.
        train_images: Images in an epoch.
        assume: What the model takes for granted.
        placement: Where the teacher goes; `auto` chooses.
        stage: ZeRO stage; None chooses.
        measured: The pair where it has been counted already.

    Raises:
        UserError: A pair that does not fit together, a batch that cannot be shared, or nothing that fits into the GPUs,
            with the smallest memory that would do.
    """
    own = ds_config.read(cfg.run.ds_config)
    cfg.batches(cluster.gpus)
    measured = measured or measure(cfg, num_classes, ds_config.autocast_dtype(own))
    plans, smallest = [], []
    for where in PLACEMENTS if placement == "auto" else (placement,):
        if placement == "auto" and (
            (where == "sharded" and cluster.gpus == 1) or (where != "replica" and cfg.teacher == "none")
        ):
            continue
        if where == "offload" and _host_bytes(measured, cluster) > assume.host_memory_gib * GIB:
            continue
        for number in range(4) if stage is None else (stage,):
            name = cfg.run.ds_config if ds_config.stage_of(own) == number else f"zero{number}"
            layout = Layout.of(ds_config.read(name), cluster.gpus, where)
            smallest.append((sum(memory_parts(measured, cfg, layout, 1).values()), number, where))
            plan = _plan(measured, cfg, cluster, layout, name, train_images, assume)
            if plan is not None:
                plans.append(plan)
    if plans:
        return _best(plans), plans
    if not smallest:
        raise UserError(
            f"the teacher does not fit into a node's memory: {_host_bytes(measured, cluster) / GIB:.0f} GiB on the host for "
            f"{cluster.nodes_of} ranks; set --assume.host_memory_gib or another --teacher-placement."
        )
    count, number, where = min(smallest)
    raise UserError(
        f"{cfg.student} with {cfg.teacher} fits into no GPU of {cluster.gpu_memory:g} GiB, whatever the stage: with one image "
        f"it takes {cluster.memory_for(count, assume):.1f} GiB at ZeRO {number}, teacher {where}, on {cluster.gpus} GPUs."
    )


def placement_that_fits(
    cfg: RunConfig, config: dict[str, Any], num_classes: int, world_size: int, gpu_memory: float
) -> TeacherPlacement:
    """The first place for the teacher with which a run fits as it is configured; the smallest one where none does.

    Args:
        cfg: The run, its micro batch included.
        config: The DeepSpeed JSON.
        num_classes: Of its data.
        world_size: Ranks.
        gpu_memory: Of one, in GiB.
    """
    measured = measure(cfg, num_classes, ds_config.autocast_dtype(config))
    room = Cluster(world_size, gpu_memory).room(Assumptions())
    micro, _ = cfg.batches(world_size)
    for placement in PLACEMENTS:
        layout = Layout.of(config, world_size, placement)
        if sum(memory_parts(measured, cfg, layout, micro).values()) <= room:
            return placement
    return PLACEMENTS[-1]


def _host_bytes(measured: Measured, cluster: Cluster) -> int:
    """Of a node: the shares of its ranks."""
    return -(-measured.teacher.bytes * min(cluster.gpus, cluster.nodes_of) // cluster.gpus)


def _best(plans: list[Plan]) -> Plan:
    """The first, in order of simplicity, that no other beats by more than the margin."""
    fastest = max(plan.images_per_s for plan in plans)
    return next(plan for plan in plans if plan.images_per_s * MARGIN >= fastest)


def _plan(
    measured: Measured,
    cfg: RunConfig,
    cluster: Cluster,
    layout: Layout,
    name: str,
    train_images: int,
    assume: Assumptions,
) -> Plan | None:
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
    """Most images in a micro batch whose step fits into `room` bytes; 0 where not even one does."""

    def fits(images: int) -> bool:
        return sum(memory_parts(measured, cfg, layout, images).values()) <= room

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
