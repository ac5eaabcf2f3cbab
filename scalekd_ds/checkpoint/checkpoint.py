"""Checkpoints: written aside, synced, renamed. A kill at any moment leaves the last good one.

run_dir/checkpoints/step00000500/
    shards_rank0.safetensors ...    parameters and optimizer, each rank its part, by the layers' names
    engine.json                     counters and schedule
    buffers.safetensors             what is not trained: statistics, frozen parameters
    rng_rank0.pt ...                generators of every rank
    student.safetensors             the bare student, BatchNorm statistics averaged over ranks
    student.json                    its card
    student_ema.*                   the same for its moving average, where the run keeps one
    state.json                      step, samples seen, world size, ZeRO stage
    manifest.json                   size and SHA-256 of every file above, written last

Any number of ranks and any ZeRO stage reads it. There is no pickle in it but torch's own of the generators, which is read
with `weights_only`.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from scalekd_ds.checkpoint.manifest import MANIFEST, sync, verify, write_json
from scalekd_ds.checkpoint.saver import LATEST, Saver
from scalekd_ds.checkpoint.shard_files import ENGINE, engine_state, restore, shard_file, snapshot
from scalekd_ds.errors import UserError
from scalekd_ds.rng import rng_state, set_rng_state

# what a checkpoint exports, by the name that consolidate() takes
WEIGHTS = {"student": "student.safetensors", "ema": "student_ema.safetensors"}
BUFFERS = "buffers.safetensors"
_STEP = re.compile(r"step(\d{8})")


def checkpoints_of(run_dir: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    found = (run_dir / "checkpoints").glob("step*")
    return sorted(p for p in found if _STEP.fullmatch(p.name) and p.is_dir())


def write_student(weights: Path, state: dict[str, torch.Tensor], card: dict[str, Any]) -> None:
    """Writes plain weights and their card beside them; the weights appear last."""
    weights.parent.mkdir(parents=True, exist_ok=True)
    write_json(weights.with_suffix(".json"), card)
    partial = weights.with_name(f".{weights.name}.partial")
    save_file(state, partial, metadata={"format": "pt"})
    sync(partial)
    partial.rename(weights)
    sync(weights.parent)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The `state.json` of a checkpoint that `verify` has passed."""
    return json.loads((checkpoint / "state.json").read_text())


def save(
    engine: Any,
    saver: Saver,
    state: dict[str, Any],
    card: dict[str, Any],
    average: tuple[dict[str, torch.Tensor], dict[str, Any]] | None = None,
) -> Path:
    """Begins a checkpoint, which `saver` finishes beside the training; collective.

    Call `saver.copied()` before the weights are updated again.

    Args:
        engine: The engine.
        saver: Of this run.
        state: At least `step`, `world_size` and `zero_stage`; `top1` where it was measured.
        card: Of the student.
        average: State-dict and card of the student's moving average, where there is one.

    Returns:
        Where the finished checkpoint will be.
    """
    from deepspeed import comm as dist

    from scalekd_ds.engine.engine import gathered, student_state, synchronise_buffers

    rank = dist.get_rank()
    synchronise_buffers(engine.module)
    # the copies' memory is the last checkpoint's, until that is written
    saver.wait()
    generators, counters = rng_state(), engine_state(engine)
    # ZeRO-3 gathers them from all ranks, all at the same time; at the other stages they only change in the next update
    whole = student_state(engine.module, saver.copies) if engine.zero_optimization_stage() == 3 else None
    state_dict = engine.module.state_dict(keep_vars=True)
    untrained = {
        name: gathered(tensor, saver.copies, f"untrained {name}")
        for name, tensor in state_dict.items()
        if not tensor.requires_grad
    }

    # BatchNorm's change in the next forward pass
    prefix = "student."
    statistics = {name.removeprefix(prefix): t for name, t in untrained.items() if name.startswith(prefix)}

    def take() -> Callable[[Path], None]:
        shards = snapshot(engine, saver.copies)
        weights = student_state(engine.module, saver.copies) if whole is None else whole
        return functools.partial(write, shards, weights | statistics)

    def write(shards: dict[str, torch.Tensor], weights: dict[str, torch.Tensor], folder: Path) -> None:
        save_file(shards, shard_file(folder, rank))
        torch.save(generators, folder / f"rng_rank{rank}.pt")
        if rank == 0:
            save_file(untrained, folder / BUFFERS)
            write_json(folder / ENGINE, counters)
            write_student(folder / WEIGHTS["student"], weights, card)
            if average is not None:
                write_student(folder / WEIGHTS["ema"], *average)
            write_json(folder / "state.json", state)
        for path in (shard_file(folder, rank), folder / f"rng_rank{rank}.pt"):
            sync(path)

    return saver.start(state["step"], take)


def choose(run_dir: Path, resume: str) -> Path | None:
    """The checkpoint to go on from, verified; None for a fresh start.

    Args:
        run_dir: The run's folder.
        resume: `auto`, `never`, or a checkpoint's folder.

    Raises:
        UserError: A missing or damaged checkpoint, or a used folder without `resume`.
    """
    found = checkpoints_of(run_dir)
    if resume == "never":
        if found:
            raise UserError(
                f"{run_dir} already holds {len(found)} checkpoint(s), the last {found[-1].name}: add --run.resume auto to "
                "go on from it, or choose another --run.dir."
            )
        return None
    # each rank of a job reads its share of the files
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if resume != "auto":
        verify(Path(resume), rank, world_size)
        return Path(resume)
    newest = _named_by(run_dir / LATEST)
    if newest and newest not in [p.name for p in found]:
        raise UserError(
            f"{run_dir / 'checkpoints' / newest} is missing, though {run_dir / LATEST} names it as the newest: restore "
            "it, or give the checkpoint to go on from as --run.resume PATH."
        )
    if not found:
        return None
    verify(found[-1], rank, world_size)
    return found[-1]


def _named_by(latest: Path) -> str | None:
    if not latest.exists():
        return None
    try:
        return json.loads(latest.read_text())["checkpoint"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{latest} is damaged ({error}): give the checkpoint as --run.resume PATH.") from None


def load(engine: Any, checkpoint: Path) -> dict[str, Any]:
    """Restores engine and generators from a verified checkpoint of any world size and ZeRO stage; collective.

    Returns:
        Its state.

    Raises:
        UserError: It was written by a release before 0.2, or is of another model or optimizer.
    """
    from deepspeed import comm as dist

    from scalekd_ds.engine.engine import overwrite

    state = read_state(checkpoint)
    if not (checkpoint / ENGINE).is_file():
        raise UserError(
            f"{checkpoint} has no {ENGINE}: an older release wrote it. Start a new run from its student.safetensors with "
            "--student_weights."
        )
    restore(engine, checkpoint, state["world_size"])
    own = engine.module.state_dict(keep_vars=True)
    for name, saved in load_file(checkpoint / BUFFERS).items():
        if name not in own or getattr(own[name], "ds_shape", own[name].shape) != saved.shape:
            raise UserError(f"{checkpoint} has {name}, which this model has not: start it as it was started.")
        overwrite(own[name], saved)
    rank = dist.get_rank()
    # ranks that were not there draw from the run's seed
    if state["world_size"] == dist.get_world_size():
        set_rng_state(torch.load(checkpoint / f"rng_rank{rank}.pt", weights_only=True))
    return state


def consolidate(checkpoint_dir: str | Path, weights: str | None = None) -> dict[str, torch.Tensor]:
    """The plain student of a checkpoint from any ZeRO stage: timm's names, float32, BatchNorm buffers included.

    Args:
        checkpoint_dir: A checkpoint's folder, a run's folder, or its checkpoints/ (the newest is taken).
        weights: `student` for its own weights, `ema` for their moving average; None takes what the run ships.

    Raises:
        UserError: No checkpoint there, a damaged one, or one without an average.
    """
    return read_weights(weights_file(resolve(Path(checkpoint_dir)), weights))


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    """A .safetensors file of a verified checkpoint.

    Raises:
        UserError: It cannot be read.
    """
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read: {error}.") from None


def weights_file(checkpoint: Path, weights: str | None = None) -> Path:
    """The plain weights in a checkpoint, which is verified, by the name that `consolidate` takes.

    Raises:
        UserError: A damaged checkpoint, another name, or an average that is not there.
    """
    verify(checkpoint)
    if weights is None:
        ema = read_state(checkpoint).get("config", {}).get("ema", {})
        weights = "ema" if ema.get("decay") and ema["evaluate"] else "student"
    if weights not in WEIGHTS:
        raise UserError(f"weights is {weights!r}: it must be one of {', '.join(WEIGHTS)}.")
    file = checkpoint / WEIGHTS[weights]
    if not file.is_file():
        raise UserError(
            f"{checkpoint} holds no {weights} weights: its run kept no average. Take `student`, or train with --ema.decay "
            "0.9999."
        )
    return file


def resolve(path: Path) -> Path:
    """A checkpoint's folder from itself, or the newest of its run or of the run's checkpoints/.

    Raises:
        UserError: There is none.
    """
    if (path / MANIFEST).is_file() or _STEP.fullmatch(path.name):
        return path
    found = checkpoints_of(path.parent if path.name == "checkpoints" else path)
    if not found:
        raise UserError(f"{str(path)!r} holds no checkpoint: give runs/NAME or runs/NAME/checkpoints/stepNNNNNNNN.")
    return found[-1]
