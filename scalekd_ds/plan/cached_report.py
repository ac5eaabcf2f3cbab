"""Shows what a teacher cache takes and saves, as lines of text and as plain data."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from scalekd_ds.plan.cached import CachePlan
from scalekd_ds.teacher_cache.sizes import format_decimal


def cache_as_dict(plan: CachePlan) -> dict[str, Any]:
    """The cache as plain data, in bytes, bytes/s, views/s, hours and epochs."""
    contents = plan.contents
    return {
        "images": contents.images,
        "views": contents.views,
        "store": contents.store if contents.targets.tokens else None,
        "logits": _held_logits(plan),
        "bytes": {"entry": contents.entry, "view": contents.view, "total": contents.bytes},
        "read_bytes_per_s": {"rank": plan.read_rate / plan.gpus, "job": plan.read_rate},
        "making": plan.making and {**asdict(plan.making), "gpu_hours": plan.making.hours * plan.gpus},
        "hours": {
            "with_cache": plan.cached.hours,
            "with_teacher": plan.live and plan.live.hours,
            "saved": plan.hours_saved,
        },
        "pays_after_epochs": plan.pays_after,
        "pays_from_run": plan.pays_from_run,
    }


def cache_lines(plan: CachePlan, gpu_memory: float) -> list[str]:
    """The cache in sentences.

    Args:
        plan: The cache and the runs that it is compared in.
        gpu_memory: Memory of a GPU in GiB.
    """
    contents, making, rate = plan.contents, plan.making, plan.read_rate
    tokens = f"tokens in {contents.store}" if contents.targets.tokens else "no tokens"
    classes = contents.targets.classes
    logits = f"{_held_logits(plan):,} of {classes:,} logits" if classes else "no logits"
    lines = [
        f"teacher cache of {contents.views:,} views with {tokens} and {logits}: {format_decimal(contents.entry)} an entry, "
        f"{format_decimal(contents.view)} a view of {contents.images:,} images, {format_decimal(contents.bytes)} on disk",
        f"read at {plan.cached.images_per_s:,.0f} images/s: {rate / 1e6:,.1f} MB/s, of which each rank reads "
        f"{rate / plan.gpus / 1e6:,.1f} MB/s",
    ]
    if making is None:
        lines.append(
            f"it cannot be made on these GPUs: the teacher's forward pass does not fit into {gpu_memory:g} GiB, however the "
            "teacher is placed"
        )
    else:
        lines.append(
            f"made in {_hours(making.hours, plan.gpus)} at {making.images_per_s:,.0f} views/s, with {making.micro_batch} "
            f"images in a forward pass on a rank, teacher {making.placement}"
        )
    with_cache = f"a run from it takes {_hours(plan.cached.hours, plan.gpus)}"
    if plan.live is None or plan.hours_saved is None:
        return [*lines, f"{with_cache}; with its teacher it fits into no GPU of {gpu_memory:g} GiB"]
    saved = plan.hours_saved
    more = "saves" if saved >= 0.0 else "loses"
    lines.append(
        f"{with_cache}, with its teacher {_hours(plan.live.hours, plan.gpus)}: each run {more} "
        f"{_hours(abs(saved), plan.gpus)}, {abs(saved) / plan.live.hours:.0%}"
    )
    return [*lines, _when_it_pays(plan)] if making is not None else lines


def _held_logits(plan: CachePlan) -> int:
    """Logits, or log-probabilities of the likeliest classes, in an entry."""
    classes, logits = plan.contents.targets.classes, plan.contents.logits
    return classes if logits is None else min(classes, logits)


def _when_it_pays(plan: CachePlan) -> str:
    after, run = plan.pays_after, plan.pays_from_run
    if after is None or run is None:
        slow = plan.cached.time.reading > 0.0
        reason = (
            "the disk is slower than the teacher (--assume.disk_gb_s)" if slow else "the teacher takes next to no time"
        )
        return f"the cache never pays: a run from it takes no less time, since {reason}"
    if run == 1:
        return f"the cache pays within the first run, after {after:,.0f} of its {plan.epochs:g} epochs"
    return (
        f"the cache pays from run {run:,} of this schedule on, with another seed or student: after {after:,.0f} epochs in "
        f"all, of which a run has {plan.epochs:g}"
    )


def _hours(hours: float, gpus: int) -> str:
    digits = 1 if hours >= 1.0 else 2
    return f"{hours:,.{digits}f} h ({hours * gpus:,.1f} GPU hours)"
