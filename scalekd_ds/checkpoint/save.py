"""Begins a checkpoint: copies what is to be saved on every rank, and writes it to this rank's files."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist

from scalekd_ds.checkpoint.layout import BUFFERS, WEIGHTS
from scalekd_ds.checkpoint.plain_weights import write_student
from scalekd_ds.checkpoint.recovery_script import write_recovery_script
from scalekd_ds.checkpoint.saver import Saver
from scalekd_ds.checkpoint.shard_files import ENGINE, engine_state, shard_file, snapshot
from scalekd_ds.engine.gather import gather_all, student_state, synchronise_buffers
from scalekd_ds.engine.host_copies import now
from scalekd_ds.files.durable import save_tensors, sync, write_json
from scalekd_ds.rng import rng_state


def save_checkpoint(
    engine: Any,
    saver: Saver,
    state: dict[str, Any],
    card: dict[str, Any],
    average: tuple[dict[str, torch.Tensor], dict[str, Any]] | None = None,
) -> Path:
    """Begins a checkpoint, which `saver` writes while training goes on; collective.

    Call `saver.wait_copied()` before the weights are updated again.

    Args:
        engine: The engine.
        saver: The run's saver.
        state: Contents of `state.json`: at least `step`, `world_size` and `zero_stage`, and `top1` where it was
            measured.
        card: The student's card.
        average: State dict and card of the student's moving average, where the run keeps one; on rank 0 alone it is read.

    Returns:
        The folder of the checkpoint, which exists once it is finished.
    """
    rank = dist.get_rank()
    synchronise_buffers(engine.module)
    # the last checkpoint is written from the memory that the copies go to
    saver.wait_written()
    generators, counters = rng_state(), engine_state(engine)
    # rank 0 alone writes whole weights: at ZeRO-3 the others take part in gathering them, and else they copy none
    is_first = rank == 0
    # ZeRO-3 gathers the weights with collectives, so they are copied here; at other stages they do not change before
    # the next update, and are copied in `capture`
    is_sharded = engine.zero_optimization_stage() == 3
    whole = student_state(engine.module, saver.copies, is_first) if is_sharded else None
    state_dict = engine.module.state_dict(keep_vars=True)
    frozen = {name: tensor for name, tensor in state_dict.items() if not tensor.requires_grad}
    untrained = gather_all(frozen, saver.copies, is_first, "untrained ")
    # the statistics of BatchNorm change in the next forward pass, so the student gets those of the copy
    prefix = "student."
    statistics = {name.removeprefix(prefix): t for name, t in untrained.items() if name.startswith(prefix)}
    ready = now(engine.device)

    def capture() -> Callable[[Path], None]:
        with saver.copies.beside(ready):
            shards = snapshot(engine, saver.copies)
            weights = student_state(engine.module, saver.copies, is_first) if whole is None else whole
        return functools.partial(write, shards, weights | statistics)

    def write(shards: dict[str, torch.Tensor], weights: dict[str, torch.Tensor], folder: Path) -> None:
        save_tensors(shard_file(folder, rank), shards)
        # through Python's file, whose errors say what the system says
        with (folder / f"rng_rank{rank}.pt").open("wb") as file:
            torch.save(generators, file)
        if rank == 0:
            save_tensors(folder / BUFFERS, untrained)
            write_json(folder / ENGINE, counters)
            write_student(folder / WEIGHTS["student"], weights, card)
            if average is not None:
                write_student(folder / WEIGHTS["ema"], *average)
            write_json(folder / "state.json", state)
            write_recovery_script(folder)
        for path in (shard_file(folder, rank), folder / f"rng_rank{rank}.pt"):
            sync(path)

    return saver.start(state["step"], capture)
