"""What is exported: the student in memory, its card, and what its run tells of its making."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scalekd_ds.checkpoint.layout import read_state, resolve
from scalekd_ds.checkpoint.plain_weights import weights_file
from scalekd_ds.errors import UserError
from scalekd_ds.models.build import build_model
from scalekd_ds.models.card import read_card

# of the logits, absolute
TOLERANCE = 1e-4
# no dimension of a student has this length by chance, so that a converter cannot take one for the other
_EXAMPLE_BATCH = 3
CHECKED_BATCHES = (1, 8)


class Normalised(nn.Module):
    """The model behind its own normalisation: pixels (B, 3, H, W) in [0, 1] -> logits (B, K)."""

    def __init__(self, model: nn.Module, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model((images - self.mean) / self.std)


@dataclass(frozen=True)
class Subject:
    """model: timm's, float32, in eval mode; network: the same or `Normalised`; config: of the run, where it is known."""

    model: nn.Module
    network: nn.Module
    card: dict[str, Any]
    config: dict[str, Any] | None

    @property
    def normalised(self) -> bool:
        return self.network is not self.model

    def images(self, batch: int = _EXAMPLE_BATCH, seed: int = 0) -> torch.Tensor:
        """Random images (batch, 3, S, S) in the range that the network takes."""
        size = self.card["image_size"]
        generator = torch.Generator().manual_seed(seed)
        draw = torch.rand if self.normalised else torch.randn
        return draw(batch, 3, size, size, generator=generator)

    @torch.no_grad()
    def check(self, run: Callable[[torch.Tensor], torch.Tensor], what: str) -> float:
        """The largest difference of the logits that `run` gives from the student's, at batches of 1 and 8.

        Raises:
            UserError: It is above 1e-4, or `run` fails.
        """
        worst = 0.0
        for batch in CHECKED_BATCHES:
            images = self.images(batch, seed=batch)
            wanted = self.network(images)
            try:
                given = run(images)
            # what runs is another program, which raises what it likes
            except Exception as error:
                raise UserError(f"{what} fails at batch {batch}, and is not kept: {first_line(error)}.") from None
            if given.shape != wanted.shape:
                raise UserError(f"{what} gives {tuple(given.shape)} at batch {batch}, not {tuple(wanted.shape)}.")
            difference = (given - wanted).abs().max().item()
            # NaN is not below anything
            if not difference <= TOLERANCE:
                raise UserError(
                    f"{what} differs from the student by {difference:.2g} at batch {batch}, more than {TOLERANCE:g}, and is "
                    "not kept."
                )
            worst = max(worst, difference)
        return worst


def first_line(error: Exception) -> str:
    """Of an error of another library, for a line of ours."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")


def cannot(subject: Subject, format: str, error: Exception) -> UserError:
    """For a converter that fails."""
    return UserError(f"{subject.card['architecture']} cannot be exported as {format}: {first_line(error)}.")


def _run_beside(file: Path, card: dict[str, Any]) -> dict[str, Any] | None:
    """The configuration beside a run's own student.safetensors, if it is of the same run."""
    try:
        config = json.loads((file.parent / "config.json").read_text())
        step = json.loads((file.parent / "results.json").read_text())["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return config if step == card.get("step") and config.get("recipe") == card.get("recipe") else None


def load_subject(source: str | Path, weights: str | None = None, with_preprocessing: bool = False) -> Subject:
    """The student of a run, a checkpoint or a consolidated file, built by timm and loaded strictly.

    Raises:
        UserError: None of these, a damaged one, or a card that lacks what is needed.
    """
    source = Path(source)
    if source.is_dir():
        checkpoint = resolve(source)
        file = weights_file(checkpoint, weights)
        config = read_state(checkpoint).get("config")
    elif source.suffix == ".safetensors":
        if weights is not None:
            raise UserError(f"--weights is {weights!r}, but {source} holds one set of weights: leave it out.")
        file, config = source, None
    elif source.exists():
        raise UserError(
            f"{source} is no checkpoint: give a run's folder, a checkpoint's, or a consolidated .safetensors."
        )
    else:
        raise UserError(f"{str(source)!r} does not exist: give a run's folder, a checkpoint's, or a .safetensors.")
    card = read_card(file)
    for key in ("architecture", "num_classes", "image_size", "mean", "std"):
        if card.get(key) is None:
            raise UserError(f"the card of {file} has no {key!r}: consolidate the checkpoint again.")
    model = build_model(str(file)).eval().float().requires_grad_(False)
    # a published card tells nobody's folders
    teacher = str(card.get("teacher") or "none")
    card = {**card, "teacher": Path(teacher).name if teacher.endswith((".safetensors", ".pth", ".pt")) else teacher}
    network = Normalised(model, card["mean"], card["std"]).eval() if with_preprocessing else model
    return Subject(model, network, card, config or _run_beside(file, card))
