#!/usr/bin/env python3
"""Draws results as bar charts in PNG files, with the floor as a line: `python benchmarks/plot.py [FILE.json ...]`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import harness
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# a variant has the same colour in every chart, and the colours differ in grey too
COLOURS = {
    "library": "#1b6ca8",
    "ours": "#1b6ca8",
    "triton": "#0b3c5d",
    "sdpa": "#e0a458",
    "compile": "#7fb069",
    "eager": "#b8b8b8",
    "published": "#c8553d",
}


def _described(machine: dict[str, Any]) -> str:
    device = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    return f"\n{device}, torch {machine['torch']}, {machine['date'][:10]}"


def _errors(variant: dict[str, float]) -> list[list[float]]:
    return [[variant["median"] - variant["p20"]], [variant["p80"] - variant["median"]]]


def _finish(figure: Any, axes: Any, title: str, path: Path) -> Path:
    axes.set_title(title, fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def draw_step(result: dict[str, Any], path: Path) -> Path:
    """Draws the milliseconds of each variant's step by part, and its floor: its FLOP over the ceiling of its precision."""
    # one that could not be measured has no bar
    variants = {name: {"parts": {}} | v for name, v in result["variants"].items() if "error" not in v}
    figure, axes = plt.subplots(figsize=(8, 0.7 * len(variants) + 1.4))
    labels = list(dict.fromkeys(part for v in variants.values() for part in v["parts"]))
    for y, variant in enumerate(variants.values()):
        left = 0.0
        # shares from the profiled steps, over the length of an undisturbed one
        for part, colour in zip(labels, plt.cm.tab10.colors, strict=False):
            width = variant["median"] * variant["parts"].get(part, {"share": 0.0})["share"]
            axes.barh(y, width, left=left, color=colour, label=part if y == 0 else None)
            left += width
        if not labels:
            axes.barh(y, variant["median"], color=COLOURS["ours"])
        axes.errorbar(variant["median"], y, xerr=_errors(variant), color="black", capsize=3, linewidth=1)
        if variant["floor_ms"]:
            axes.vlines(variant["floor_ms"], y - 0.45, y + 0.45, color="black", linestyle="--", linewidth=1.5)
    axes.plot([], [], color="black", linestyle="--", label="floor")
    axes.set_yticks(range(len(variants)), [f"{n}\n{v['images_per_s']:.3g} images/s" for n, v in variants.items()])
    axes.invert_yaxis()
    axes.set_xlabel("ms a step")
    axes.legend(fontsize=7, ncol=5, frameon=False, loc="upper left", bbox_to_anchor=(0.0, -0.22))
    return _finish(figure, axes, f"{result['pair']}, batch {result['batch']}{_described(result['machine'])}", path)


def draw_kernel(rows: list[dict[str, Any]], machine: dict[str, Any], path: Path) -> Path:
    """Draws the milliseconds of one operation in one direction: a group of bars and the floor for each shape."""
    names = list(dict.fromkeys(name for row in rows for name in row["variants"]))
    figure, axes = plt.subplots(figsize=(max(5.0, 1.4 * len(rows) + 2), 3.6))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        for x, row in enumerate(rows):
            if "median" not in row["variants"].get(name, {}):
                continue
            variant, at = row["variants"][name], x + (i - (len(names) - 1) / 2) * width
            axes.bar(at, variant["median"], width, yerr=_errors(variant), capsize=2, color=COLOURS[name])
        axes.bar(0, 0, color=COLOURS[name], label=name)
    for x, row in enumerate(rows):
        axes.hlines(row["floor_ms"], x - 0.45, x + 0.45, color="black", linestyle="--", linewidth=1.5)
    axes.plot([], [], color="black", linestyle="--", label="floor")
    axes.set_yscale("log")
    axes.set_ylabel("ms")
    axes.set_xticks(range(len(rows)), [row["shape"] for row in rows], rotation=20, ha="right", fontsize=8)
    axes.legend(fontsize=7, frameon=False, ncol=3)
    first = rows[0]
    title = f"{first['operation']}, {first['direction']}, {first['dtype']}, batch {first['sizes']['batch']}"
    return _finish(figure, axes, f"{title}{_described(machine)}", path)


def draw(file: Path) -> list[Path]:
    """Draws the charts of one result into the folder of its file, and returns their paths.

    Raises:
        ValueError: The file is not a result of step.py or kernels.py.
    """
    try:
        result = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"FILE is {str(file)!r}: it must be readable JSON ({error}).") from None
    kind = result.get("benchmark") if isinstance(result, dict) else None
    if kind == "step":
        return [draw_step(result, file.with_suffix(".png"))]
    if kind != "kernels":
        raise ValueError(f"FILE is {str(file)!r}: it must be a result of step.py or kernels.py.")
    charts: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        charts.setdefault((row["operation"], row["direction"]), []).append(row)
    drawn = []
    for (operation, direction), rows in charts.items():
        path = file.with_name(f"{file.stem}-{operation}-{direction.replace('+', '-')}.png")
        drawn.append(draw_kernel(rows, result["machine"], path))
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "files", nargs="*", type=Path, metavar="FILE", help="default: all in $OUT or benchmarks/results"
    )
    files = parser.parse_args().files
    if not files:
        folder = harness.results_dir(None)
        files = sorted([*folder.glob("step-*.json"), *folder.glob("kernels-*.json")])
    try:
        for path in (path for file in files for path in draw(file)):
            print(f"wrote {path}")
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
