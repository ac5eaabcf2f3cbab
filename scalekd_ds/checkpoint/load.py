"""Resumes a run: chooses the checkpoint, and restores engine and random generators from it."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist
from safetensors.torch import load_file

from scalekd_ds.checkpoint.layout import (
    BUFFERS,
    LATEST,
    checkpoints_of,
    read_latest,
    read_state,
    resolve_checkpoint,
    step_in_name,
)
from scalekd_ds.checkpoint.manifest import verify
from scalekd_ds.checkpoint.shard_files import ENGINE, restore, shard_file
from scalekd_ds.engine.gather import overwrite
from scalekd_ds.errors import UserError
from scalekd_ds.files.durable import sync, write_json
from scalekd_ds.names import escape, utf8_path
from scalekd_ds.rng import set_rng_state


def choose_checkpoint(run_dir: Path, resume: str) -> Path | None:
    """The verified checkpoint to resume from; None for a new run. Each rank of a job verifies a share of the files.

    Args:
        run_dir: The run's folder.
        resume: `run.resume`: `auto`, `never`, or the folder of a checkpoint or of another run.

    Raises:
        UserError: The checkpoint is missing or damaged, `resume` is `never` and the run has checkpoints already, or it names
            a checkpoint and the run has others already.
    """
    found = checkpoints_of(run_dir)
    if resume == "never":
        if found:
            raise UserError(
                f"{run_dir} already holds {len(found)} checkpoint(s), the last {found[-1].name}: add --run.resume auto "
                "to go on from it, or choose another --run.dir."
            )
        return None
    # from the environment, because the process group does not exist yet
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if resume != "auto":
        chosen = _chosen(resume, run_dir, found)
        _check(chosen, rank, world_size)
        return chosen
    newest = read_latest(run_dir / LATEST)
    if newest and newest not in [p.name for p in found]:
        raise UserError(
            f"{run_dir / 'checkpoints' / newest} is missing, though {run_dir / LATEST} names it as the newest: restore "
            "it, or give the checkpoint to go on from as --run.resume PATH."
        )
    if not found:
        return None
    _check(found[-1], rank, world_size)
    return found[-1]


def _check(checkpoint: Path, rank: int, world_size: int) -> None:
    """Checks the files of a checkpoint and what it says of itself.

    Raises:
        UserError: It is damaged; the message says with what the run can go on instead.
    """
    siblings = checkpoints_of(checkpoint.parent.parent)
    before = siblings[: siblings.index(checkpoint)] if checkpoint in siblings else []
    instead = "restore it, or start a new run in another --run.dir"
    if before:
        instead = f"--run.resume {shlex.quote(str(before[-1]))} goes on from the one before it"
    verify(checkpoint, rank, world_size, instead)
    _check_state(checkpoint, instead)


def _chosen(resume: str, run_dir: Path, found: list[Path]) -> Path:
    """The checkpoint that `run.resume` names, or the newest of a run that it names.

    Raises:
        UserError: There is none, or `run_dir` has checkpoints (`found`), and it is none of them.
    """
    # unlike Path.is_dir(), it takes a name that is too long for one that is missing
    if not os.path.isdir(resume):
        problem = "is a file" if os.path.isfile(resume) else "does not exist"
        raise UserError(
            f"checkpoint {resume!r} {problem}: --run.resume is auto, never, or the folder of a checkpoint, such as "
            f"{run_dir / 'checkpoints' / 'stepNNNNNNNN'}."
        )
    chosen = resolve_checkpoint(Path(resume))
    # by its own name, which says which ones are later, and not by that of a link to it
    for own in found:
        if own.samefile(chosen):
            return own
    if found:
        raise UserError(
            f"--run.resume is {resume}, and {run_dir} holds checkpoints of its own, the last {found[-1].name}: choose another "
            "--run.dir, move them away, or go on from the last with --run.resume auto."
        )
    return chosen


def leave_later(run_dir: Path, checkpoint: Path) -> str | None:
    """Renames the later checkpoints of a run that goes on from an earlier one, and returns a line about it, or None.

    `auto` would go on from them otherwise, and not from what is trained from here on. None of them is deleted.

    Raises:
        OSError: One of them cannot be renamed; what has been renamed can still be resumed under its new name.
    """
    folder = run_dir / "checkpoints"
    later = [path for path in checkpoints_of(run_dir) if path.name > checkpoint.name]
    if not later:
        return None
    write_json(run_dir / LATEST, {"checkpoint": checkpoint.name})
    names = []
    for path in later:
        taken = len(list(folder.glob(f"left-{path.name}*")))
        names.append(f"left-{path.name}" + (f"-{taken + 1}" if taken else ""))
        path.rename(folder / names[-1])
    sync(folder)
    return (
        f"the checkpoints after {checkpoint.name} are left behind as {', '.join(names)} in {escape(folder)}: delete them, or "
        "go on from one of them in another --run.dir"
    )


def _check_state(checkpoint: Path, instead: str) -> None:
    """Checks what the manifest of a checkpoint cannot, which somebody may have written anew.

    Raises:
        UserError: `state.json` is damaged, a rank's file is missing, or the folder has the name of another step, by which
            checkpoints are ordered.
    """
    try:
        state = read_state(checkpoint)
        step, ranks = int(state["step"]), int(state["world_size"])
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{checkpoint / 'state.json'} is damaged ({type(error).__name__}: {error}); {instead}."
        ) from None
    for rank in range(ranks):
        if not shard_file(checkpoint, rank).is_file() and (checkpoint / ENGINE).is_file():
            raise UserError(f"{shard_file(checkpoint, rank)} is missing: {checkpoint} is of {ranks} ranks; restore it.")
    named = step_in_name(checkpoint)
    if named not in (None, step):
        raise UserError(f"{checkpoint} is the checkpoint of step {step}: rename it to step{step:08d}, or move it away.")


def load_checkpoint(engine: Any, checkpoint: Path) -> dict[str, Any]:
    """Restores engine and random generators from a verified checkpoint of any world size and ZeRO stage; collective.

    Generators are restored where the world size is the same; on another they keep the state that they have.

    Returns:
        The checkpoint's `state.json`.

    Raises:
        UserError: An older release wrote the checkpoint, or it is that of another model or optimizer.
    """
    state = read_state(checkpoint)
    if not (checkpoint / ENGINE).is_file():
        raise UserError(
            f"{checkpoint} has no {ENGINE}: an older release wrote it. Start a new run from its student.safetensors "
            "with --student_weights."
        )
    restore(engine, checkpoint, state["world_size"])
    own = engine.module.state_dict(keep_vars=True)
    with utf8_path(checkpoint / BUFFERS) as path:
        buffers = load_file(path)
    for name, saved in buffers.items():
        if name not in own or getattr(own[name], "ds_shape", own[name].shape) != saved.shape:
            raise UserError(
                f"{checkpoint} has {name}, which this model does not have: resume the run with the settings that it "
                "was started with."
            )
        overwrite(own[name], saved)
    rank = dist.get_rank()
    # on another number of ranks the generators keep their state, which comes from the run's seed
    if state["world_size"] == dist.get_world_size():
        set_rng_state(torch.load(checkpoint / f"rng_rank{rank}.pt", weights_only=True))
    return state
