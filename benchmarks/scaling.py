#!/usr/bin/env python3
"""Predicts weak scaling to 1,024 GPUs, and plans for a 7 B teacher, by `scalekd_ds.plan`: `python benchmarks/scaling.py`.

Nothing here is measured. Bytes are counted, and seconds follow from assumptions, which are in the chart and in the JSON.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import harness
import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from scalekd_ds.config import RunConfig, TeacherPlacement
from scalekd_ds.engine import ds_config
from scalekd_ds.errors import UserError
from scalekd_ds.plan.assumptions import Assumptions
from scalekd_ds.plan.choose import Cluster, make_plan
from scalekd_ds.plan.communication import collectives
from scalekd_ds.plan.measure import Measured, measure
from scalekd_ds.plan.memory import Layout
from scalekd_ds.plan.report import as_dict
from scalekd_ds.plan.throughput import step_time
from scalekd_ds.recipes import RECIPES

CLASSES, IMAGENET, NODE = 1000, 1_281_167, 8
RECIPE = "swin_l-resnet50-traditional"
RANKS = tuple(2**i for i in range(11))
GPUS, MEMORY = (8, 16, 32), (24, 40, 80)
# ZeRO stage and teacher placement of each curve
CURVES: dict[str, tuple[int, TeacherPlacement]] = {
    "ZeRO 0, replica": (0, "replica"),
    "ZeRO 1, replica": (1, "replica"),
    "ZeRO 2, replica": (2, "replica"),
    "ZeRO 3, replica": (3, "replica"),
    "ZeRO 2, sharded teacher": (2, "sharded"),
}


def huge_teacher() -> RunConfig:
    """The recipe with DINOv3-7B as teacher, without KD on logits, since that has no classifier."""
    cfg = RECIPES[RECIPE]()
    distill = replace(cfg.distill, kd_weight=0.0, heads_s3=None, heads_s4=None, softmax_scale=1.0)
    return replace(cfg, teacher="vit_7b_patch16_dinov3", teacher_image_size=224, distill=distill)


def weak_scaling(cfg: RunConfig, measured: Measured, assume: Assumptions) -> dict[str, list[dict[str, float]]]:
    """Images/s by number of ranks, with the recipe's micro batch on each rank and one micro batch in a step.

    The global batch grows with the number of ranks.

    Args:
        cfg: The run.
        measured: The measurements of the run.
        assume: The assumptions of the model.

    Returns:
        Name of a curve -> its points, with `ranks`, `images_per_s`, `seconds` of a step by part, and `efficiency`, the share
        of perfect scaling.
    """
    curves: dict[str, list[dict[str, float]]] = {}
    micro = cfg.micro_batch_size
    for name, (stage, placement) in CURVES.items():
        points = []
        for ranks in RANKS:
            layout = Layout.of(ds_config.read(f"zero{stage}"), ranks, placement)
            sent = collectives(measured, cfg, layout, 1)
            time = step_time(measured, cfg, layout, sent, micro, 1, assume, NODE)
            points.append({"ranks": ranks, "images_per_s": ranks * micro / time.total, "seconds": asdict(time)})
        single_rate = points[0]["images_per_s"]
        for point in points:
            point["efficiency"] = point["images_per_s"] / (point["ranks"] * single_rate)
        curves[name] = points
    return curves


def draw(pairs: dict[str, dict[str, Any]], assume: Assumptions, path: Path) -> None:
    """Draws the share of perfect scaling by number of ranks, in a panel for each pair, with the assumptions below."""
    figure, panels = plt.subplots(1, len(pairs), figsize=(10, 4.6), sharey=True)
    for axes, (title, pair) in zip(panels, pairs.items(), strict=True):
        for (name, points), style in zip(pair["curves"].items(), ("-", "--", "-.", ":", (0, (1, 3))), strict=True):
            axes.plot([p["ranks"] for p in points], [p["efficiency"] for p in points], linestyle=style, label=name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(RANKS[::2], [f"{ranks:,}" for ranks in RANKS[::2]])
        axes.axvline(NODE, color="#b8b8b8", linewidth=0.8)
        axes.set_ylim(0.0, 1.05)
        axes.set_xlabel(f"GPUs, {NODE} in a node")
        axes.set_title(f"{title}, {pair['micro_batch']} images a GPU", fontsize=9, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("share of perfect weak scaling")
    panels[0].legend(fontsize=7, frameon=False, loc="lower left")
    shown = [f"{name} {value:g}" for name, value in asdict(assume).items()]
    half = len(shown) // 2
    lines = ("a model, not a measurement; assumed: " + ", ".join(shown[:half]), ", ".join(shown[half:]))
    figure.text(0.01, 0.01, "\n".join(lines), fontsize=6.5)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plans_of(cfg: RunConfig, measured: Measured, assume: Assumptions) -> list[dict[str, Any]]:
    """The best plan for each number of GPUs in `GPUS` and each memory in `MEMORY`, or why there is none."""
    rows = []
    for gpus in GPUS:
        for memory in MEMORY:
            row: dict[str, Any] = {"gpus": gpus, "gpu_memory_gib": memory}
            try:
                best, _ = make_plan(cfg, Cluster(gpus, memory, NODE), CLASSES, IMAGENET, assume, measured=measured)
                rows.append(row | {"plan": as_dict(best)})
            except UserError as error:
                rows.append(row | {"error": str(error)})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of `plans_of` as a table in Markdown."""
    names = ("parameters", "gradients", "optimizer", "teacher", "activations", "temporary", "buckets", "gathered")
    head = [
        "GPUs",
        "GiB",
        "ZeRO",
        "teacher",
        "micro batch",
        *names,
        "other",
        "total",
        "sent a step",
        "images/s",
        "hours",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        cells = [str(row["gpus"]), str(row["gpu_memory_gib"])]
        if "error" in row:
            lines.append("| " + " | ".join(cells + [row["error"]] + [""] * (len(head) - 3)) + " |")
            continue
        plan = row["plan"]
        memory = {name: plan["memory"][name] / 2**30 for name in names}
        total = plan["memory"]["total"] / 2**30
        memory |= {"other": total - sum(memory.values()), "total": total}
        sent = sum(c["sent_by_a_rank"] for c in plan["communication"]) / 2**30
        cells += [str(plan["zero_stage"]), plan["teacher_placement"]]
        cells += [f"{plan['micro_batch_size']} (x{plan['gradient_accumulation_steps']})"]
        cells += [f"{value:.2f}" for value in memory.values()]
        cells += [f"{sent:.1f}", f"{plan['images_per_s']:,.0f}", f"{plan['hours']:,.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="folder for scaling.json and scaling.png (default benchmarks/results)")
    parser.add_argument("--table", action="store_true", help="only print the plans for the 7 B teacher, as Markdown")
    args = parser.parse_args()
    assume = Assumptions()
    huge = huge_teacher()
    measured = measure(huge, CLASSES, torch.bfloat16)
    rows = plans_of(huge, measured, assume)
    print(table(rows))
    if args.table:
        return
    small = RECIPES[RECIPE]()
    pairs = {}
    for title, cfg, counted in (
        ("Swin-L -> ResNet-50", small, measure(small, CLASSES, torch.bfloat16)),
        ("DINOv3-7B -> ResNet-50", huge, measured),
    ):
        pairs[title] = {"micro_batch": cfg.micro_batch_size, "curves": weak_scaling(cfg, counted, assume)}
    folder = harness.results_dir(args.out)
    result = {"benchmark": "scaling", "measured": False, "assumptions": asdict(assume), "pairs": pairs, "plans": rows}
    (folder / "scaling.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(pairs, assume, folder / "scaling.png")
    print(f"wrote {folder / 'scaling.json'} and scaling.png")


if __name__ == "__main__":
    main()
