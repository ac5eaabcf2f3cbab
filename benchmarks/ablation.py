#!/usr/bin/env python3
"""The paper's ablations on Fashion-MNIST: each part of ScaleKD removed, over several seeds: `make ablation`.

Every row is the recipe `fashion-scalekd` with one change. The rows of a seed share initialisation, images and their order, so
the difference to the full method is taken for each seed. Finished runs are not repeated.
"""

from __future__ import annotations

from pathlib import Path

import harness
import seeds

from scalekd_ds.errors import UserError, run_cli

FULL = "ScaleKD"
ROWS: dict[str, tuple[str, ...]] = {
    FULL: (),
    "linear projector for CAP": ("--distill.projector", "linear"),
    "spatial view only": ("--distill.weights_s3", "[0.08, 0]", "--distill.weights_s4", "[0.08, 0]"),
    "frequency view only": ("--distill.weights_s3", "[0, 0.06]", "--distill.weights_s4", "[0, 0.06]"),
    "no TPP": ("--distill.tpp", "false"),
    "last stage only": ("--distill.weights_s3", "[0, 0]"),
    "no logit KD": ("--distill.kd_weight", "0"),
    "logit KD only": ("--distill.features", "false"),
    "no teacher": ("--teacher", "none"),
}


def plot(rows: list[dict], path: Path) -> None:
    """Draws the rows of `seeds.summary` as a bar chart."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = rows[::-1]
    figure, axes = plt.subplots(figsize=(7, 0.42 * len(rows) + 1.2))
    axes.barh(
        [r["row"] for r in shown],
        [r["mean"] for r in shown],
        xerr=[r["deviation"] or 0.0 for r in shown],
        color=["tab:blue" if r["row"] == FULL else "lightsteelblue" for r in shown],
    )
    for place, row in enumerate(shown):
        axes.plot(row["top1"], [place] * len(row["top1"]), "k.", markersize=4)
    low = min(min(r["top1"]) for r in rows)
    axes.set_xlim(low - 1.0, max(max(r["top1"]) for r in rows) + 0.5)
    axes.set_xlabel(
        "Fashion-MNIST test top-1 in percent: points are seeds, bars their mean; the axis begins above 0", fontsize=8
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = seeds.parser_of(__doc__.splitlines()[0], seeds=3, out="runs/ablation")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), help=f"some of: {', '.join(ROWS)}")
    args = parser.parse_args()
    if unknown := [row for row in args.rows if row not in ROWS]:
        raise UserError(f"--rows has {unknown[0]!r}: it must be some of {', '.join(ROWS)}.")
    seeds.check(args)
    run = seeds.begin(args)
    common = ["--teacher", str(seeds.trained_teacher(run, args)), *seeds.schedule_of(args)]
    rows = seeds.summary(seeds.run_all(run, args, {row: ROWS[row] for row in args.rows}, common), FULL)
    folder = harness.results_dir(args.results)
    result = {"benchmark": "ablation", "epochs": args.epochs, "seeds": args.seeds, "rows": rows}
    harness.write_json(folder / "ablation.json", result)
    plot(rows, folder / "ablation.png")
    lines = seeds.table(rows, "to the full method")
    (folder / "ablation.md").write_text(lines)
    print(lines, end="")


if __name__ == "__main__":
    run_cli(main)
