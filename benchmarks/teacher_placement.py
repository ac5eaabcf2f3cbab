#!/usr/bin/env python3
"""What sharding the teacher costs a step: `deepspeed --num_accelerators 2 benchmarks/teacher_placement.py`.

A ViT of 11 M parameters as a replica and sharded over the ranks, the two steps in turn in one process on each rank. The
floor is the replica's step: sharding adds the gathering of each block, beside which nothing is computed on a CPU.
"""

from __future__ import annotations

import argparse
import time

import harness
import timing
import torch
from deepspeed import comm as dist

from scalekd_ds.distiller import ScaleKD
from scalekd_ds.engine.processes import start_processes
from scalekd_ds.engine.teacher_placement import place_teacher
from scalekd_ds.teacher import Teacher

CLASSES, SIZE = 7, 96
VIT = {"img_size": SIZE, "embed_dim": 384, "depth": 6, "num_heads": 6, "num_classes": CLASSES}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--local_rank", type=int, default=0, help="set by the deepspeed launcher")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9, help="rounds over both")
    return parser.parse_args()


def main() -> None:
    args = parse()
    device = start_processes()
    torch.manual_seed(0)
    images = torch.randn(args.batch, 3, SIZE, SIZE, device=device)
    labels = torch.randint(CLASSES, (args.batch,), device=device)
    distillers = {}
    for placement in ("replica", "sharded"):
        teacher = Teacher("vit_small_patch16_224", weights="none", **VIT)
        distiller = ScaleKD("resnet18", teacher, image_size=SIZE, num_classes=CLASSES, verbose=False)
        place_teacher(teacher, placement, device)
        distillers[placement] = distiller.to(device) if placement == "replica" else distiller

    def seconds_of(distiller: ScaleKD) -> float:
        # all ranks begin together, and the slowest one ends the step
        dist.barrier()
        begin = time.perf_counter()
        distiller(images, labels)["loss/total"].backward()
        timing.synchronise(device)
        dist.barrier()
        return time.perf_counter() - begin

    for distiller in distillers.values():
        seconds_of(distiller)
    seconds = {placement: [] for placement in distillers}
    for _ in range(args.repeats):
        for placement, distiller in distillers.items():
            seconds[placement].append(seconds_of(distiller))
    if dist.get_rank() == 0:
        ratio = timing.speedup(seconds["sharded"], seconds["replica"])
        rows = [[name, *(1e3 * v for v in timing.quantiles(times).values())] for name, times in seconds.items()]
        harness.print_table(["ms of a step", "median", "p20", "p80"], [*rows, ["times the replica's", *ratio.values()]])
    dist.barrier()


if __name__ == "__main__":
    main()
