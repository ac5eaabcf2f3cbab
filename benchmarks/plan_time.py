#!/usr/bin/env python3
"""How well a plan predicts a ratio of times: `python benchmarks/plan_time.py`, a minute on one thread of a CPU.

Two runs that differ in their teacher's depth step in turn in one process. The plan says from FLOP alone how many times longer
the deeper one takes; the clock says how long it took. What a CPU reaches of its peak differs between convolutions and
products, and between processors, so the two differ too: this prints by how much here, and no test depends on it.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import harness
import timing
import torch

from scalekd_ds.build import build_distiller
from scalekd_ds.config import DataConfig, DistillConfig, RunConfig
from scalekd_ds.plan.assumptions import Assumptions
from scalekd_ds.plan.measure import measure
from scalekd_ds.plan.memory import Layout
from scalekd_ds.plan.throughput import step_time

CLASSES = 10
RUN = RunConfig(
    student="resnet18",
    student_kwargs={"layers": [1, 1, 1, 1], "channels": [32, 32, 64, 128]},
    teacher="vit_7b_patch16_dinov3",
    teacher_kwargs={"embed_dim": 384, "num_heads": 6, "mlp_ratio": 2, "num_classes": CLASSES, "img_size": 64},
    teacher_weights="none",
    data=DataConfig(image_size=64),
    distill=DistillConfig(features=False),
)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depths", type=int, nargs=2, default=[2, 10], help="blocks of the two teachers")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9, help="rounds over both")
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    device = torch.device("cpu")
    steps, predicted = {}, {}
    images, labels = torch.randn(args.batch, 3, 64, 64), torch.randint(CLASSES, (args.batch,))
    for depth in args.depths:
        cfg = replace(RUN, teacher_kwargs=RUN.teacher_kwargs | {"depth": depth})
        distiller = build_distiller(cfg, CLASSES, verbose=False).train()
        steps[str(depth)] = lambda distiller=distiller: distiller(images, labels)["loss/total"].backward()
        measured, layout = measure(cfg, CLASSES, None, on_gpu=False), Layout.of({}, 1, "replica")
        # of the step's FLOP alone: nothing is sent, and memory costs no time
        free_memory = Assumptions(memory_gb_s=1e9)
        predicted[str(depth)] = step_time(measured, cfg, layout, [], args.batch, 1, free_memory, args.batch).total
    seconds = timing.seconds_of(timing.alternate(steps, device, args.repeats))
    fewer, more = map(str, args.depths)
    ratio = timing.speedup(seconds[more], seconds[fewer])
    head = [f"teacher of {more} blocks over one of {fewer}", "median", "p20", "p80"]
    harness.print_table(
        head,
        [
            ["measured", ratio["median"], ratio["p20"], ratio["p80"]],
            ["planned", predicted[more] / predicted[fewer]] + [None] * 2,
        ],
    )


if __name__ == "__main__":
    main()
