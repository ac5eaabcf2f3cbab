#!/usr/bin/env python3
"""What a checkpoint costs a run: how long the step waits, how long the disk writes, and how long a resume takes.

    python benchmarks/checkpoint.py --parameters 100
    deepspeed --num_accelerators 2 benchmarks/checkpoint.py

AdamW on a stack of linear layers under ZeRO: 12 bytes a parameter are saved, and the student's own 4 besides.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import deepspeed
import harness
import torch
from deepspeed import comm as dist
from torch import nn

from scalekd_ds.checkpoint.load import load_checkpoint
from scalekd_ds.checkpoint.manifest import verify
from scalekd_ds.checkpoint.save import save_checkpoint
from scalekd_ds.checkpoint.saver import Saver
from scalekd_ds.engine.processes import job_store, start_processes

# of the writing's time, and seconds; what the issue asks for
EXPECTED = {"wait share": 0.1, "resume s": 5.0}


class Stack(nn.Module):
    """`millions` of parameters in square layers, where a distiller has its student."""

    def __init__(self, millions: float, width: int = 2048) -> None:
        super().__init__()
        self.student = nn.Sequential(*(nn.Linear(width, width) for _ in range(round(millions * 1e6 / width**2))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.student(x).square().mean()


def start(args: argparse.Namespace):
    torch.manual_seed(0)
    module = Stack(args.parameters)
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=torch.optim.AdamW(module.parameters(), lr=1e-4),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": args.stage},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        },
    )
    return engine


def step(engine) -> None:
    engine.backward(engine(torch.randn(2, 2048, device=engine.device)))
    engine.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--local_rank", type=int, default=0, help="set by the deepspeed launcher")
    parser.add_argument("--parameters", type=float, default=100.0, help="millions")
    parser.add_argument("--stage", type=int, default=1, help="of ZeRO")
    parser.add_argument("--batch", type=int, default=1024, help="rows of a step, whose time hides the copies")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", help="where to write; a temporary folder without it")
    parser.add_argument("--out", help="folder of the JSON; else $OUT, else benchmarks/results")
    args = parser.parse_args()
    device = start_processes()
    rank = dist.get_rank()
    shared = [tempfile.mkdtemp(dir=args.folder) if rank == 0 else None]
    torch.distributed.broadcast_object_list(shared)
    folder = Path(shared[0])
    engine = start(args)
    step(engine)
    saver = Saver(folder, 1, 0, job_store())
    waits, writes = [], []
    for number in range(1, args.repeats + 1):
        dist.barrier()
        began = time.perf_counter()
        state = {"step": number, "world_size": dist.get_world_size(), "zero_stage": args.stage}
        path = save_checkpoint(engine, saver, state, {})
        wait = time.perf_counter() - began
        # the next step, up to its update
        engine.backward(engine(torch.randn(args.batch, 2048, device=device)))
        copying = time.perf_counter()
        saver.copied()
        waits.append(wait + time.perf_counter() - copying)
        engine.step()
        if problem := saver.wait():
            sys.exit(problem)
        writes.append(time.perf_counter() - began - waits[-1])
    held = sum(p.stat().st_size for p in path.iterdir())
    engine.destroy()
    del engine
    fresh = start(args)
    step(fresh)
    began = time.perf_counter()
    verify(path, rank, dist.get_world_size())
    load_checkpoint(fresh, path)
    dist.barrier()
    resume = time.perf_counter() - began
    if rank == 0:
        wait, write = statistics.median(waits), statistics.median(writes)
        found = {"wait s": wait, "write s": write, "wait share": wait / write, "resume s": resume, "bytes": held}
        harness.print_table(["", "measured", "at most"], [[k, v, EXPECTED.get(k)] for k, v in found.items()])
        result = {"benchmark": "checkpoint", "machine": harness.machine(device), "settings": vars(args), **found}
        harness.write_json(harness.results_dir(args.out) / f"checkpoint-{device.type}.json", result)
        for old in path.iterdir():
            old.unlink()
    dist.barrier()


if __name__ == "__main__":
    main()
