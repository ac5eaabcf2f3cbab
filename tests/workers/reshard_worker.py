"""Saves and restores shards over ZeRO stages and world sizes. Prints one JSON line of errors against the uninterrupted run."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from deepspeed import comm as dist
from optim_worker import CASES, Net, batches, error, weights
from ranks import backward, begin, engine_of, tell
from safetensors.torch import save_file

from scalekd_ds.checkpoint.shard_files import ENGINE, engine_state, restore, shard_file, snapshot
from scalekd_ds.config import OptimConfig
from scalekd_ds.engine.host_copies import HostCopies
from scalekd_ds.files.durable import write_json
from scalekd_ds.optim import lamb
from scalekd_ds.optim.optimizers import build_optimizer

OPTIMIZERS = {"sgd": 0.05, "adamw": 0.01, "lamb": 0.02}
SAVED, STEPS = 3, 6


def start(name: str, zero: dict):
    net, cfg = Net(), OptimConfig(name, lr=OPTIMIZERS[name], weight_decay=0.1, eps=1e-6)
    optimizer = build_optimizer(net, cfg)
    config = {
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 24 // dist.get_world_size(),
        "gradient_clipping": 0.5,
    }
    schedule = lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1.0 / (1 + step))  # noqa: E731
    engine = engine_of(net, optimizer, zero, config, lr_scheduler=schedule)
    if name == "lamb":
        lamb.attach(optimizer, engine)
    return engine


def train(engine, data) -> None:
    for x, y in data:
        backward(engine, x.repeat(3, 1), y.repeat(3, 1))
        engine.step()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--load", type=int, default=0, help="world size that saved; 0 saves")
    args = begin(parser)
    initial, errors = [p.detach().clone() for p in Net().parameters()], {}
    for name in OPTIMIZERS:
        for stage, zero in CASES.items():
            folder = args.folder / f"{name}-{stage}".replace(" ", "_")
            if not args.load:
                engine = start(name, zero)
                train(engine, batches()[:SAVED])
                folder.mkdir(exist_ok=True)
                save_file(snapshot(engine, HostCopies()), shard_file(folder, dist.get_rank()))
                if dist.get_rank() == 0:
                    write_json(folder / ENGINE, engine_state(engine))
                train(engine, batches()[SAVED:STEPS])
                whole = weights(engine)
                if dist.get_rank() == 0:
                    torch.save(whole, folder / "whole.pt")
                dist.barrier()
                engine.destroy()
            # what one stage saved, every other one reads
            others = CASES if stage in ("zero0", "zero2", "zero3") else {stage: zero}
            for other, other_zero in others.items():
                engine = start(name, other_zero)
                restore(engine, folder, args.load or dist.get_world_size())
                assert engine.global_steps == SAVED and engine.get_lr()[0] == OPTIMIZERS[name] / (1 + SAVED)
                train(engine, batches()[SAVED:STEPS])
                expected = torch.load(folder / "whole.pt", weights_only=True)
                errors[f"{name}: {stage} -> {other}"] = error(weights(engine), expected, initial)
                engine.destroy()
    tell(errors)


if __name__ == "__main__":
    main()
