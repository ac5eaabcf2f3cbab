"""The student that is exported: the model in memory, its card, and the configuration of its run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scalekd_ds.checkpoint.layout import of_checkpoint, read_state
from scalekd_ds.checkpoint.plain_weights import weights_file
from scalekd_ds.errors import UserError, cause_of
from scalekd_ds.export.origin import published_name
from scalekd_ds.models.build import build_model
from scalekd_ds.models.card import read_card
from scalekd_ds.names import escape, is_unicode

# largest absolute difference of the logits that passes
TOLERANCE = 1e-4
# a batch size that no other dimension of a student has, so that a converter cannot confuse the two
_EXAMPLE_BATCH = 3
CHECKED_BATCHES = (1, 8)
# fields of a card in which a user's folders may stand
_MAY_HOLD_PATHS = ("recipe", "model_kwargs")


class Normalised(nn.Module):
    """A model with its normalisation in front: pixels (B, 3, H, W) in [0, 1] -> logits (B, K)."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: nn.Module, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (B, K) of pixels (B, 3, H, W) in [0, 1]."""
        return self.model((images - self.mean) / self.std)


@dataclass(frozen=True)
class LoadedStudent:
    """A student to export.

    Attributes:
        model: timm's model, in float32 and eval mode.
        network: The module that is exported: `model`, or `Normalised` around it.
        card: The student's card.
        config: The configuration of its run, or None if unknown.
        results: What the run wrote into results.json at its end, or None if unknown.
    """

    model: nn.Module
    network: nn.Module
    card: dict[str, Any]
    config: dict[str, Any] | None
    results: dict[str, Any] | None = None

    @property
    def normalised(self) -> bool:
        """Whether the exported network normalises its images itself."""
        return self.network is not self.model

    @property
    def input_range(self) -> str:
        """What the values of an input image must be, for the code in the model card."""
        return "in [0, 1]" if self.normalised else "normalised with the mean and std above"

    def example_images(self, batch: int = _EXAMPLE_BATCH, seed: int = 0) -> torch.Tensor:
        """Random images (batch, 3, S, S) in the range that the network takes."""
        size = self.card["image_size"]
        generator = torch.Generator().manual_seed(seed)
        draw = torch.rand if self.normalised else torch.randn
        return draw(batch, 3, size, size, generator=generator)

    @torch.no_grad()
    def check_logits(self, run: Callable[[torch.Tensor], torch.Tensor], what: str) -> float:
        """The largest absolute difference between the logits of an exported program and of the student.

        Args:
            run: The exported program: images (B, 3, S, S) -> logits (B, K). It is called with batches of 1 and 8.
            what: What the program is called in error messages.

        Raises:
            UserError: The difference is above 1e-4, or the program fails or returns another shape.
        """
        worst = 0.0
        for batch in CHECKED_BATCHES:
            images = self.example_images(batch, seed=batch)
            expected = self.network(images)
            try:
                given = run(images)
            # an exported program may raise any error
            except Exception as error:
                raise UserError(f"{what} fails at batch {batch}, and is not kept: {cause_of(error)}.") from None
            if given.shape != expected.shape:
                raise UserError(f"{what} gives {tuple(given.shape)} at batch {batch}, not {tuple(expected.shape)}.")
            difference = (given - expected).abs().max().item()
            # written so that NaN is refused too
            if not difference <= TOLERANCE:
                raise UserError(
                    f"{what} differs from the student by {difference:.2g} at batch {batch}, more than {TOLERANCE:g}, and is "
                    "not kept."
                )
            worst = max(worst, difference)
        return worst


def _run_beside(file: Path, card: dict[str, Any]) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """(configuration, results) in the folder of a run's student.safetensors; None where missing or of another run."""
    try:
        config = json.loads((file.parent / "config.json").read_text())
        results = json.loads((file.parent / "results.json").read_text())
        of_this_run = results["step"] == card.get("step") and config.get("recipe") == card.get("recipe")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None, None
    return (config, results) if of_this_run else (None, None)


def load_student(source: str | Path, weights: str | None = None, with_preprocessing: bool = False) -> LoadedStudent:
    """Loads the student of a run, a checkpoint or a consolidated file; every weight must match.

    Args:
        source: A run's folder, a checkpoint's, or a consolidated .safetensors with its card beside it.
        weights: `student` or `ema` of a checkpoint; None takes what the run ships.
        with_preprocessing: Put the normalisation into the exported network.

    Raises:
        UserError: The source is none of these or is damaged, or its card lacks a field.
    """
    source = Path(source)
    if source.is_dir():

        def load(checkpoint: Path) -> LoadedStudent:
            file = weights_file(checkpoint, weights)
            return _load(file, read_state(checkpoint).get("config"), with_preprocessing)

        return of_checkpoint(source, load)
    if source.suffix == ".safetensors":
        if weights is not None:
            raise UserError(f"--weights is {weights!r}, but {source} holds one set of weights: leave it out.")
        return _load(source, None, with_preprocessing)
    if source.exists():
        raise UserError(
            f"{source} is no checkpoint: give a run's folder, a checkpoint's, or a consolidated .safetensors."
        )
    raise UserError(f"{str(source)!r} does not exist: give a run's folder, a checkpoint's, or a .safetensors.")


def _load(file: Path, config: dict[str, Any] | None, with_preprocessing: bool) -> LoadedStudent:
    """Loads the student of a consolidated file, and the configuration beside it where `config` is None."""
    card = read_card(file)
    for key in ("architecture", "num_classes", "image_size", "mean", "std"):
        if card.get(key) is None:
            raise UserError(f"the card of {file} has no {key!r}: consolidate the checkpoint again.")
    model = build_model(str(file)).eval().float().requires_grad_(False)
    # the card is published
    card = {**card, **{key: published_name(card[key]) for key in _MAY_HOLD_PATHS if key in card}}
    card["teacher"] = published_name(str(card.get("teacher") or "none"))
    if card.get("classes"):
        # for readers in other languages, whose texts hold no byte that is no UTF-8
        card["classes"] = [name if is_unicode(name) else escape(name) for name in map(str, card["classes"])]
    network = Normalised(model, card["mean"], card["std"]).eval() if with_preprocessing else model
    beside = (config, None) if config else _run_beside(file, card)
    return LoadedStudent(model, network, card, *beside)
