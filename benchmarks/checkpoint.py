#!/usr/bin/env python3
"""Measures what a checkpoint costs: how long the step waits, how long the disk writes, and how long a resume takes.

    python benchmarks/checkpoint.py --parameters 100
    deepspeed --num_accelerators 2 benchmarks/checkpoint.py

It trains a stack of linear layers with AdamW under ZeRO. A checkpoint has 12 bytes for each parameter and its moments, and
4 more for the student's plain weights.
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

# the aims: the wait as a share of the time of writing, and seconds of a resume
EXPECTED = {"wait share": 0.1, "resume s": 5.0}


class Stack(nn.Module):
    """About `millions` of parameters in square layers, as the attribute `student`, as a distiller has it."""

    def __init__(self, millions: float, width: int = 2048) -> None:
        super().__init__()
        self.student = nn.Sequential(*(nn.Linear(width, width) for _ in range(round(millions * 1e6 / width**2))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.student(x).square().mean()


def make_engine(args: argparse.Namespace) -> deepspeed.DeepSpeedEngine:
    """A DeepSpeed engine of the stack. Collective."""
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


def train_step(engine: deepspeed.DeepSpeedEngine) -> None:
    """One optimizer step on two random rows. Collective."""
    engine.backward(engine(torch.randn(2, 2048, device=engine.device)))
    engine.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--local_rank", type=int, default=0, help="set by the deepspeed launcher")
    parser.add_argument("--parameters", type=float, default=100.0, help="millions")
    parser.add_argument("--stage", type=int, default=1, help="ZeRO stage")
    parser.add_argument("--batch", type=int, default=1024, help="rows of the step beside which the copies are made")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", help="where to write (default: a temporary folder)")
    parser.add_argument("--out", help="folder of the JSON; else $OUT, else benchmarks/results")
    args = parser.parse_args()
    device = start_processes()
    rank = dist.get_rank()
    shared = [tempfile.mkdtemp(dir=args.folder) if rank == 0 else None]
    torch.distributed.broadcast_object_list(shared)
    folder = Path(shared[0])
    engine = make_engine(args)
    train_step(engine)
    saver = Saver(folder, 1, 0, job_store())
    waits, writes = [], []
    for number in range(1, args.repeats + 1):
        dist.barrier()
        began = time.perf_counter()
        state = {"step": number, "world_size": dist.get_world_size(), "zero_stage": args.stage}
        path = save_checkpoint(engine, saver, state, {})
        wait = time.perf_counter() - began
        # the forward and backward passes of the next step, beside which the copies are made
        engine.backward(engine(torch.randn(args.batch, 2048, device=device)))
        copying_began = time.perf_counter()
        saver.wait_copied()
        waits.append(wait + time.perf_counter() - copying_began)
        engine.step()
        if problem := saver.wait_written():
            sys.exit(problem)
        writes.append(time.perf_counter() - began - waits[-1])
    num_bytes = sum(p.stat().st_size for p in path.iterdir())
    engine.destroy()
    del engine
    fresh = make_engine(args)
    train_step(fresh)
    began = time.perf_counter()
    verify(path, rank, dist.get_world_size())
    load_checkpoint(fresh, path)
    dist.barrier()
    resume = time.perf_counter() - began
    if rank == 0:
        wait, write = statistics.median(waits), statistics.median(writes)
        found = {"wait s": wait, "write s": write, "wait share": wait / write, "resume s": resume, "bytes": num_bytes}
        harness.print_table(["", "measured", "at most"], [[k, v, EXPECTED.get(k)] for k, v in found.items()])
        result = {"benchmark": "checkpoint", "machine": harness.machine(device), "settings": vars(args), **found}
        harness.write_json(harness.results_dir(args.out) / f"checkpoint-{device.type}.json", result)
        for old in path.iterdir():
            old.unlink()
    dist.barrier()


if __name__ == "__main__":
    main()
