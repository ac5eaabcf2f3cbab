"""Plain weights: the student alone as a state dict with timm's names, written to and read from checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from scalekd_ds.checkpoint.layout import WEIGHTS, of_checkpoint, read_state
from scalekd_ds.checkpoint.manifest import verify
from scalekd_ds.errors import UserError
from scalekd_ds.files.durable import save_tensors, write_json, written_aside
from scalekd_ds.names import utf8_path


def write_student(weights: Path, state: dict[str, torch.Tensor], card: dict[str, Any]) -> None:
    """Writes plain weights and their JSON card beside them; the file of the weights appears last, and complete.

    Args:
        weights: The .safetensors to write; its card has the same name and the ending .json.
        state: Tensors of any shape by timm's names.
        card: Contents of the card.

    Raises:
        OSError: It cannot be written; the file that was there before is there still.
    """
    weights.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(weights) as partial:
        # what takes the most room comes first: where it fails, the card of the file before is still that of the file
        save_tensors(partial, state, {"format": "pt"})
        write_json(weights.with_suffix(".json"), card)


def consolidate(checkpoint_dir: str | Path, weights: str | None = None) -> dict[str, torch.Tensor]:
    """Reads the student of a checkpoint of any ZeRO stage: a state dict with timm's names, float32, with buffers.

    Args:
        checkpoint_dir: Folder of a checkpoint, or of a run or its checkpoints/, of which the newest is taken.
        weights: `student` for the student's own weights, `ema` for their moving average; None takes the ones that the
            run ships.

    Returns:
        Name -> tensor on the CPU, in the shapes that the timm model's own state dict has.

    Raises:
        UserError: There is no checkpoint, it is damaged, or it has no moving average.
    """
    return of_checkpoint(Path(checkpoint_dir), lambda checkpoint: read_weights(weights_file(checkpoint, weights)))


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    """Reads plain weights from the .safetensors file of a verified checkpoint.

    Raises:
        UserError: The file cannot be read.
    """
    try:
        with utf8_path(file) as path:
            return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read: {error}.") from None


def weights_file(checkpoint: Path, weights: str | None = None) -> Path:
    """Verifies a checkpoint, and returns the path of its plain weights.

    Args:
        checkpoint: Folder of the checkpoint.
        weights: As for `consolidate`.

    Raises:
        UserError: The checkpoint is damaged, `weights` is another name, or the checkpoint has no moving average.
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
            f"{checkpoint} holds no {weights} weights: its run kept no average. Take `student`, or train with "
            "--ema.decay 0.9999."
        )
    return file
