"""Loaders of small sources on the CPU, and the first of their batches."""

from __future__ import annotations

import torch

from scalekd_ds.config import DataConfig
from scalekd_ds.data import EvalLoader, StreamSampler, TrainLoader
from scalekd_ds.data.sources.source import Source

CPU = torch.device("cpu")
# a mean and a standard deviation that leave pixels as they are, 0 to 255
RAW = ((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))


def train_loader(
    source: Source,
    cfg: DataConfig,
    micro=4,
    rank=0,
    world_size=1,
    seed=0,
    start_step=0,
    batch=None,
    pixels=RAW,
    device=CPU,
) -> TrainLoader:
    """One rank's loader of micro batches of `micro` images; `batch` is the global one, `pixels` is (mean, std)."""
    sampler = StreamSampler(len(source), seed, batch or micro * world_size, micro, rank, world_size)
    return TrainLoader(source, cfg, sampler, device, *pixels, start_step)


def eval_loader(source: Source, cfg: DataConfig, batch: int, rank=0, world_size=1, device=CPU) -> EvalLoader:
    """One rank's loader of raw pixels."""
    return EvalLoader(source, cfg, batch, rank, world_size, device, *RAW)


def take(loader, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The first `count` batches."""
    iterator = iter(loader)
    batches = [next(iterator) for _ in range(count)]
    iterator.close()
    return batches
