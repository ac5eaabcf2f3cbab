"""Shows plans as tables and as plain data."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from scalekd_ds.config import RunConfig
from scalekd_ds.plan.cached import CachePlan
from scalekd_ds.plan.cached_report import cache_as_dict, cache_lines
from scalekd_ds.plan.choose import GIB, Cluster, Plan
from scalekd_ds.plan.measure import Measured
from scalekd_ds.plan.throughput import Assumptions


def as_dict(plan: Plan) -> dict[str, Any]:
    """A plan as plain data, in bytes, seconds, images/s and hours."""
    return {
        "zero_stage": plan.layout.stage,
        "ds_config": plan.ds_config,
        "teacher_placement": plan.layout.placement,
        "gpus": plan.layout.world_size,
        "micro_batch_size": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "largest_micro_batch_size": plan.largest_micro_batch,
        "memory": plan.memory | {"total": sum(plan.memory.values())},
        "room": plan.room,
        "communication": [
            {
                "what": c.what,
                "operation": c.operation,
                "bytes": c.bytes,
                "sent_by_a_rank": round(c.wire(plan.layout.world_size)),
                "messages": c.messages,
            }
            for c in plan.sent
        ],
        "seconds_per_step": asdict(plan.time) | {"total": plan.time.total},
        "images_per_s": plan.images_per_s,
        "hours": plan.hours,
    }


def plans_as_dict(
    cfg: RunConfig,
    cluster: Cluster,
    measured: Measured,
    assume: Assumptions,
    best: Plan,
    plans: list[Plan],
    cache: CachePlan | None = None,
) -> dict[str, Any]:
    """Plain data with everything that the tables show, and with the assumptions, for JSON."""
    return {
        "recipe": cfg.recipe,
        "student": cfg.student,
        "teacher": cfg.teacher,
        "cluster": asdict(cluster),
        "trainable_parameters": measured.numel,
        "teacher_bytes": measured.teacher.bytes,
        "flop_per_image": {
            "teacher": measured.teacher_flop(32) / 32,
            "student": measured.student_flop(32) / 32,
        },
        "plan": as_dict(best),
        "fits": [as_dict(plan) for plan in plans],
        "assumptions": asdict(assume),
        **({"teacher_cache": cache_as_dict(cache)} if cache else {}),
    }


def format_bytes(count: float) -> str:
    """Bytes as text, such as `1.2 MiB`."""
    for unit, factor in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:.{2 if unit == 'GiB' else 1}f} {unit}"
    return f"{round(count)} B"


def print_plan(
    console: Console,
    cfg: RunConfig,
    cluster: Cluster,
    measured: Measured,
    assume: Assumptions,
    best: Plan,
    plans: list[Plan],
    cache: CachePlan | None = None,
) -> None:
    """Prints the best plan with its memory and transfers, all plans that fit, the teacher cache, and the assumptions."""
    w = best.layout.world_size
    teacher = "last stage of the teacher" if measured.read else "teacher"
    console.print(
        f"{cfg.recipe or 'run'}: {cfg.teacher} -> {cfg.student}, {w} GPUs of {cluster.gpu_memory:g} GiB, "
        f"{measured.numel / 1e6:.1f} M trainable parameters, {teacher} {format_bytes(measured.teacher.bytes)}"
    )
    console.print(
        f"take --run.ds_config {best.ds_config} --micro_batch_size {best.micro_batch} "
        f"--run.teacher_placement {best.layout.placement}: "
        f"{best.images_per_s:,.0f} images/s, {best.hours:,.1f} h (at most {best.largest_micro_batch} images fit)",
        style="bold",
    )
    share = cfg.global_batch_size // w
    wanted = min(best.largest_micro_batch, share)
    if best.micro_batch * 2 <= wanted:
        console.print(
            f"a GPU's {share} of the {cfg.global_batch_size} images have no divisor above {best.micro_batch} up to {wanted}: "
            f"each step has {best.accumulation} micro batches; --global_batch_size {-(-share // wanted) * wanted * w} has "
            "full ones"
        )
    memory = Table(title=f"memory of a rank, of which a run can use {format_bytes(best.room)}", title_justify="left")
    memory.add_column("part")
    memory.add_column("bytes", justify="right")
    for part, count in best.memory.items():
        if count:
            memory.add_row(part, format_bytes(count))
    memory.add_row("total", format_bytes(sum(best.memory.values())), style="bold")
    console.print(memory)
    sent = Table(title=f"sent in an optimizer step of {best.accumulation} micro batches", title_justify="left")
    for name in ("what", "how", "tensor", "by a rank"):
        sent.add_column(name, justify="left" if name in ("what", "how") else "right")
    for c in best.sent:
        sent.add_row(c.what, c.operation, format_bytes(c.bytes), format_bytes(c.wire(w)))
    console.print(sent)
    console.print(_table_of_plans(plans, best))
    for line in cache_lines(cache, cluster.gpu_memory) if cache else ():
        console.print(line)
    console.print("assumed (--assume.NAME VALUE): " + ", ".join(f"{k} {v:g}" for k, v in asdict(assume).items()))


def _table_of_plans(plans: list[Plan], best: Plan) -> Table:
    # without lines between the columns, all of them fit into 80
    table = Table(title="what fits", title_justify="left", box=None, pad_edge=False)
    for name in ("ZeRO", "teacher", "micro batch", "accumulated", "memory", "ms a step", "images/s", "hours"):
        table.add_column(name, justify="right" if name != "teacher" else "left")
    for plan in plans:
        table.add_row(
            str(plan.layout.stage),
            plan.layout.placement,
            str(plan.micro_batch),
            str(plan.accumulation),
            format_bytes(sum(plan.memory.values())),
            f"{1e3 * plan.time.total:,.1f}",
            f"{plan.images_per_s:,.0f}",
            f"{plan.hours:,.1f}",
            style="bold" if plan is best else None,
        )
    return table
