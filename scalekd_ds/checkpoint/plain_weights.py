"""Plain weights: the student of a checkpoint as timm names it, and the file that holds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from scalekd_ds.checkpoint.layout import WEIGHTS, read_state, resolve
from scalekd_ds.checkpoint.manifest import verify
from scalekd_ds.durable_files import sync, write_json
from scalekd_ds.errors import UserError


def write_student(weights: Path, state: dict[str, torch.Tensor], card: dict[str, Any]) -> None:
    """Writes plain weights and their card beside them; the weights appear last."""
    weights.parent.mkdir(parents=True, exist_ok=True)
    write_json(weights.with_suffix(".json"), card)
    partial = weights.with_name(f".{weights.name}.partial")
    save_file(state, partial, metadata={"format": "pt"})
    sync(partial)
    partial.rename(weights)
    sync(weights.parent)


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
