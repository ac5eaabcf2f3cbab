"""What a teacher cache takes on disk, what making it costs, and what each run from it saves."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from scalekd_ds.config import RunConfig, TeacherPlacement
from scalekd_ds.engine.teacher_placement import PLACEMENTS
from scalekd_ds.errors import UserError
from scalekd_ds.plan.assumptions import Assumptions
from scalekd_ds.plan.choose import GIB, MARGIN, Cluster, Plan, host_bytes, make_plan
from scalekd_ds.plan.communication import teacher_transfers
from scalekd_ds.plan.measure import NOTHING, Measured, from_cache
from scalekd_ds.plan.memory import Layout, image_bytes, teacher_bytes
from scalekd_ds.plan.teacher_size import TargetShape
from scalekd_ds.plan.throughput import step_time
from scalekd_ds.teacher_cache.sizes import Store, entry_bytes

# views of an image unless told otherwise: rules of thumb, for which docs/planning.md gives the reasons
VIEWS, MIXED_VIEWS = 10, 20


@dataclass(frozen=True)
class Contents:
    """What a teacher cache holds.

    Attributes:
        images: Images of the data.
        views: Views K of each image.
        targets: The shape of the teacher's targets.
        store: How the tokens are stored.
        logits: Log-probabilities of a view, beside one of all other classes together; None holds all logits.
    """

    images: int
    views: int
    targets: TargetShape
    store: Store
    logits: int | None

    @property
    def entry(self) -> int:
        """Bytes of one view of one image."""
        return entry_bytes(**vars(self.targets), store=self.store, logits=self.logits)

    @property
    def view(self) -> int:
        """Bytes of one view of all images."""
        return self.images * self.entry

    @property
    def bytes(self) -> int:
        """Bytes of all views of all images."""
        return self.views * self.view


@dataclass(frozen=True)
class Making:
    """How a cache is made.

    Attributes:
        placement: Placement of the teacher.
        micro_batch: Images in a forward pass on one rank.
        images_per_s: Views per second of all ranks together.
        hours: Hours of the whole cache.
    """

    placement: TeacherPlacement
    micro_batch: int
    images_per_s: float
    hours: float


@dataclass(frozen=True)
class CachePlan:
    """A cache beside the run that reads it.

    Attributes:
        contents: What the cache holds.
        making: How it is made; None where the teacher's forward pass fits into no GPU.
        cached: The plan of a run from the cache.
        live: The plan of the same run with its teacher; None where it fits into no GPU.
        epochs: Epochs of a run.
        gpus: Number of GPUs.
    """

    contents: Contents
    making: Making | None
    cached: Plan
    live: Plan | None
    epochs: float
    gpus: int

    @property
    def read_rate(self) -> float:
        """Bytes per second that all ranks together read."""
        return self.contents.entry * self.cached.images_per_s

    @property
    def hours_saved(self) -> float | None:
        """Hours that a run from the cache takes less than one with the teacher; None where that fits into no GPU."""
        return None if self.live is None else self.live.hours - self.cached.hours

    @property
    def pays_after(self) -> float | None:
        """Epochs of training, in one run or several, that save as many hours as making the cache takes; None if none do."""
        saved = self.hours_saved
        if self.making is None or saved is None or saved <= 0.0:
            return None
        return self.epochs * self.making.hours / saved

    @property
    def pays_from_run(self) -> int | None:
        """The run, counted from 1, in which the cache starts to pay; None if none does."""
        if self.pays_after is None:
            return None
        # as many views as epochs are earned back in a whole run, and not just before its end
        rounded = float(f"{self.pays_after:.3g}")
        return math.floor(rounded / self.epochs) + 1


def plan_cache(
    cfg: RunConfig,
    cluster: Cluster,
    num_classes: int,
    assume: Assumptions,
    placement: TeacherPlacement | Literal["auto"],
    stage: int | None,
    measured: Measured,
    contents: Contents,
) -> tuple[CachePlan, list[Plan]]:
    """A cache with the plan of a run from it, and all plans of such a run that fit.

    Args:
        cfg: The run.
        cluster: The GPUs.
        num_classes: Classes of the run's data.
        assume: The assumptions of the throughput model.
        placement: Teacher placement, as in `make_plan`.
        stage: ZeRO stage, as in `make_plan`.
        measured: The measurements of the run with its teacher.
        contents: What the cache holds.

    Raises:
        UserError: The ranks cannot share the global batch evenly, or a run from the cache fits into no GPU.
    """

    def best_of(counted: Measured) -> tuple[Plan, list[Plan]]:
        return make_plan(cfg, cluster, num_classes, contents.images, assume, placement, stage, counted)

    cached, plans = best_of(from_cache(measured, contents.entry))
    try:
        live: Plan | None = best_of(measured)[0]
    except UserError:
        # all else that could be wrong would have been wrong above
        live = None
    making = make_cache(measured, cfg, cluster, assume, contents, cached.micro_batch, placement)
    return CachePlan(contents, making, cached, live, cfg.schedule.epochs, cluster.gpus), plans


def default_views(cfg: RunConfig) -> int:
    """Views of an image where none are asked for: the run's, else 10, or 20 of mixed images, up to the run's epochs."""
    if cfg.data.views is not None:
        return cfg.data.views
    return max(1, min(math.ceil(cfg.schedule.epochs), MIXED_VIEWS if cfg.mixes else VIEWS))


def check_can_be_cached(cfg: RunConfig) -> None:
    """Refuses a run whose targets a teacher cache does not hold.

    Raises:
        UserError: It has no teacher, or needs the teacher's tokens before the last stage.
    """
    if cfg.teacher == "none":
        raise UserError(
            "a teacher cache needs a teacher, and teacher is none: choose another --recipe or set --teacher."
        )
    if cfg.distill.needs_tokens_before:
        raise UserError(
            "distill.tpp is false, which needs the teacher's tokens before its last stage, and a teacher cache does not hold "
            "them: leave out --distill.tpp false or the cache."
        )


def make_cache(
    measured: Measured,
    cfg: RunConfig,
    cluster: Cluster,
    assume: Assumptions,
    contents: Contents,
    micro_batch: int,
    placement: TeacherPlacement | Literal["auto"] = "auto",
) -> Making | None:
    """The fastest way to make a cache with forward passes of the teacher alone; the simplest of those within 5% of it.

    Args:
        measured: The measurements of the run with its teacher.
        cfg: The run.
        cluster: The GPUs.
        assume: The assumptions of the throughput model.
        contents: What the cache holds.
        micro_batch: Most images in a forward pass on one rank.
        placement: Placement of the teacher; `auto` tries all.

    Returns:
        The way, or None if the teacher's forward pass of one image fits into no GPU.
    """
    # what is written takes as long as what is read
    alone = replace(measured, groups=(), student_flop=NOTHING, read=contents.entry)
    teacher = replace(measured.teacher, last_stage=0)
    ways = []
    for where in PLACEMENTS if placement == "auto" else (placement,):
        if placement == "auto" and where == "sharded" and cluster.gpus == 1:
            continue
        if where == "offload" and host_bytes(teacher, cluster) > assume.host_memory_gib * GIB:
            continue
        layout = Layout.of({}, cluster.gpus, where)
        room = cluster.room(assume) - teacher_bytes(measured, layout)
        fitting = (m for m in range(micro_batch, 0, -1) if measured.targets_peak(m) + image_bytes(cfg, m) <= room)
        micro = next(fitting, 0)
        if micro == 0:
            continue
        sent = teacher_transfers(replace(alone, teacher=teacher), layout, 1)
        rate = cluster.gpus * micro / step_time(alone, cfg, layout, sent, micro, 1, assume, cluster.nodes_of).total
        ways.append(Making(where, micro, rate, contents.views * contents.images / rate / 3600))
    fastest = max((way.images_per_s for way in ways), default=0.0)
    return next((way for way in ways if way.images_per_s * MARGIN >= fastest), None)
