"""Checkpoints: written aside, synced, renamed. A kill at any moment leaves the last good one.

run_dir/checkpoints/step00000500/
    zero/                 DeepSpeed's own files: parameters, optimizer, schedule, sharded by rank
    rng_rank0.pt ...      generators of every rank
    student.safetensors   the bare student, BatchNorm statistics averaged over ranks
    student.json          its card
    student_ema.*         the same for its moving average, where the run keeps one
    state.json            step, samples seen, world size, ZeRO stage
    manifest.json         size and SHA-256 of every file above, written last
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from scalekd_ds.errors import UserError

MANIFEST = "manifest.json"
# names the newest checkpoint, so that a vanished one is an error and not a silent fresh start
LATEST = "latest.json"
# what a checkpoint exports, by the name that consolidate() takes
WEIGHTS = {"student": "student.safetensors", "ema": "student_ema.safetensors"}
_STEP = re.compile(r"step(\d{8})")


def checkpoints_of(run_dir: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    found = (run_dir / "checkpoints").glob("step*")
    return sorted(p for p in found if _STEP.fullmatch(p.name) and p.is_dir())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that a reader sees the old file or the whole new one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    _sync(partial)
    partial.rename(path)
    _sync(path.parent)


def write_student(weights: Path, state: dict[str, torch.Tensor], card: dict[str, Any]) -> None:
    """Writes plain weights and their card beside them; the weights appear last."""
    weights.parent.mkdir(parents=True, exist_ok=True)
    write_json(weights.with_suffix(".json"), card)
    partial = weights.with_name(f".{weights.name}.partial")
    save_file(state, partial, metadata={"format": "pt"})
    _sync(partial)
    partial.rename(weights)
    _sync(weights.parent)


def write_manifest(folder: Path) -> None:
    """Syncs every file of a folder to the disk and lists them with size and SHA-256."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    entries = {}
    for path in files:
        _sync(path)
        entries[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    write_json(folder / MANIFEST, {"version": 1, "files": entries})
    for directory in {p.parent for p in files}:
        _sync(directory)


def verify(checkpoint: Path) -> None:
    """Checks every file of a checkpoint against its manifest.

    Raises:
        UserError: Naming the first file that is missing or damaged, and what to do.
    """
    if not checkpoint.is_dir():
        raise UserError(f"checkpoint {str(checkpoint)!r} does not exist.")
    cure = f"move {checkpoint} away to go on from the one before it"
    manifest = checkpoint / MANIFEST
    try:
        entries = json.loads(manifest.read_text())["files"]
    except FileNotFoundError:
        raise UserError(f"{manifest} is missing: this is no finished checkpoint; {cure}.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{manifest} is damaged ({type(error).__name__}: {error}); {cure}.") from None
    for name, entry in entries.items():
        path = checkpoint / name
        if not path.is_file():
            raise UserError(f"{path} is missing; {cure}.")
        if path.stat().st_size != entry["bytes"]:
            raise UserError(f"{path} has {path.stat().st_size} bytes, {entry['bytes']} were written; {cure}.")
        if _sha256(path) != entry["sha256"]:
            raise UserError(f"{path} is damaged: its SHA-256 differs from the manifest's; {cure}.")


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The `state.json` of a checkpoint that `verify` has passed."""
    return json.loads((checkpoint / "state.json").read_text())


def rng_state() -> dict[str, Any]:
    """State of every generator of this process, as tensors and plain values."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": [s.cpu() for s in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
        "python": [version, list(words), gauss],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Undoes `rng_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))


def save(
    engine: Any,
    run_dir: Path,
    state: dict[str, Any],
    card: dict[str, Any],
    keep_last: int,
    average: tuple[dict[str, torch.Tensor], dict[str, Any]] | None = None,
) -> Path:
    """Saves a checkpoint; collective. `state` has at least `step`, `world_size` and `zero_stage`.

    `average` is the state-dict and the card of the student's moving average, where there is one.

    Returns:
        The finished checkpoint's folder.
    """
    from deepspeed import comm as dist

    from scalekd_ds.engine import student_state, synchronise_buffers

    rank = dist.get_rank()
    final = run_dir / "checkpoints" / f"step{state['step']:08d}"
    partial = final.with_name(f".partial-{final.name}")
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    synchronise_buffers(engine.module)
    engine.save_checkpoint(str(partial), tag="zero", save_latest=False)
    torch.save(rng_state(), partial / f"rng_rank{rank}.pt")
    weights = student_state(engine.module)
    if rank == 0:
        write_student(partial / WEIGHTS["student"], weights, card)
        if average is not None:
            write_student(partial / WEIGHTS["ema"], *average)
        write_json(partial / "state.json", state)
    dist.barrier()
    if rank == 0:
        write_manifest(partial)
        if final.exists():
            # the same step saved again (a resumed run that ended at once): the new one is as good
            shutil.rmtree(final)
        partial.rename(final)
        _sync(final.parent)
        write_json(run_dir / LATEST, {"checkpoint": final.name})
        for old in checkpoints_of(run_dir)[:-keep_last]:
            # renamed first, so that a kill in the middle leaves no half checkpoint under a good name
            doomed = old.with_name(f".partial-{old.name}")
            shutil.rmtree(doomed, ignore_errors=True)
            old.rename(doomed)
            shutil.rmtree(doomed)
    dist.barrier()
    return final


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
    if resume != "auto":
        verify(Path(resume))
        return Path(resume)
    newest = _named_by(run_dir / LATEST)
    if newest and newest not in [p.name for p in found]:
        raise UserError(
            f"{run_dir / 'checkpoints' / newest} is missing, though {run_dir / LATEST} names it as the newest: restore "
            "it, or give the checkpoint to go on from as --run.resume PATH."
        )
    if not found:
        return None
    verify(found[-1])
    return found[-1]


def _named_by(latest: Path) -> str | None:
    if not latest.exists():
        return None
    try:
        return json.loads(latest.read_text())["checkpoint"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{latest} is damaged ({error}): give the checkpoint as --run.resume PATH.") from None


def load(engine: Any, checkpoint: Path) -> dict[str, Any]:
    """Restores engine and generators from a verified checkpoint; collective. Returns its state.

    Raises:
        UserError: It was written by another world size or ZeRO stage, or DeepSpeed cannot read it.
    """
    from deepspeed import comm as dist

    state = read_state(checkpoint)
    here = {"world_size": dist.get_world_size(), "zero_stage": engine.zero_optimization_stage()}
    for key, value in here.items():
        if state[key] != value:
            raise UserError(
                f"{checkpoint} was written with {key.replace('_', ' ')} {state[key]}, this run has {value}: start it as "
                "it was, or start a new run from its student.safetensors with --student_weights."
            )
    path, _ = engine.load_checkpoint(str(checkpoint), tag="zero")
    if path is None:
        raise UserError(f"DeepSpeed found nothing to load in {checkpoint / 'zero'}.")
    set_rng_state(torch.load(checkpoint / f"rng_rank{dist.get_rank()}.pt", weights_only=True))
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
