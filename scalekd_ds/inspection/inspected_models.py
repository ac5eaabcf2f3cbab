"""Opens the models of a sheet: a run, a checkpoint, a consolidated file or a timm model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from scalekd_ds.checkpoint.layout import resolve_checkpoint
from scalekd_ds.checkpoint.plain_weights import weights_file
from scalekd_ds.class_names import KnownClasses, match_classes
from scalekd_ds.config import RunConfig
from scalekd_ds.config.parser import read_config
from scalekd_ds.errors import UserError
from scalekd_ds.inspection.pictures import tokens_to_map
from scalekd_ds.models.build import HUB_PREFIXES, build_model, num_parameters
from scalekd_ds.models.card import read_card
from scalekd_ds.models.known_classes import known_classes
from scalekd_ds.models.preprocessing import Preprocessing, normalisation_of
from scalekd_ds.student import Student, StudentOutput, Taps
from scalekd_ds.teacher import FAMILIES, Teacher


class ModelSource(NamedTuple):
    """Where a model comes from; all fields are None for a timm model.

    Attributes:
        weights: The consolidated .safetensors, which has a card beside it.
        checkpoint: The checkpoint's folder, if the model is from a run.
        cfg: The configuration of that run, if it was found.
    """

    weights: Path | None
    checkpoint: Path | None
    cfg: RunConfig | None


class ModelOutput(NamedTuple):
    """What a model computes from images.

    Attributes:
        maps: (B, C, h, w), the map of the last stage.
        logits: (B, K), or None for a model without a classifier.
        student_output: The student's whole output, which its projectors need; None for a teacher.
    """

    maps: torch.Tensor
    logits: torch.Tensor | None
    student_output: StudentOutput | None

    @property
    def answers(self) -> torch.Tensor:
        """`logits` of a model that has a classifier."""
        if self.logits is None:
            raise RuntimeError("the model has no classifier")
        return self.logits


@dataclass(frozen=True)
class InspectedModel:
    """A model on the sheet.

    Attributes:
        role: `student`, `teacher` or `baseline`.
        title: The name that the user gave.
        network: The model in eval mode, as a `Student` or a `Teacher`.
        classes: Names of its classes for people, or None if unknown.
        folder_names: Names of its classes as folders of images have them, or None if unknown.
        known: All that is known of these names.
        size: (h, w) of its images in pixels, or None if it takes any.
        card: Its card; empty for a timm model.
        source: Where it comes from.
    """

    role: str
    title: str
    network: Any
    classes: list[str] | None
    folder_names: list[str] | None
    known: KnownClasses
    size: tuple[int, int] | None
    card: dict[str, Any]
    source: ModelSource

    @property
    def model(self) -> nn.Module:
        """timm's model inside the network."""
        return self.network.model

    @property
    def num_classes(self) -> int:
        """Number of its classes; 0 without a classifier."""
        return int(getattr(self.model, "num_classes", 0) or 0)

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W) in 0 to 1 -> images in the size and normalisation of this model."""
        if self.size is not None and self.size != tuple(pixels.shape[-2:]):
            pixels = F.interpolate(pixels, self.size, mode="bicubic", antialias=True, align_corners=False)
        mean, std = (torch.tensor(v, device=pixels.device)[:, None, None] for v in normalisation_of(self.model))
        return (pixels - mean) / std

    @torch.no_grad()
    def run(self, pixels: torch.Tensor) -> ModelOutput:
        """Runs the model on pixels (B, 3, H, W) in 0 to 1, at the size of the sheet's images."""
        images = self.normalise(pixels)
        if isinstance(self.network, Teacher):
            tokens, logits = self.network.targets(images)
            return ModelOutput(tokens_to_map(tokens, self.network.stages[1].grid), logits, None)
        output = self.network(images)
        return ModelOutput(output.last, output.logits if self.num_classes else None, output)

    def describe(self) -> str:
        """One line with the model's name, class, parameters and, if its card has it, top-1."""
        top1 = self.card.get("top1")
        accuracy = "" if top1 is None else f", top-1 {top1:.2f}% on its validation images"
        return f"{self.title}: {type(self.model).__name__}, {num_parameters(self.model) / 1e6:.2f} M{accuracy}"


def locate(name: str, weights: str | None = None) -> ModelSource:
    """Finds what a name stands for: a run's or checkpoint's folder, a consolidated file, or else a timm model.

    Args:
        name: The name that the user gave.
        weights: Which weights of a run: `student` or `ema`; None takes what the run ships.

    Raises:
        UserError: The path does not exist, a folder has no weights, or a checkpoint is damaged.
    """
    path = Path(name)
    if name.startswith(HUB_PREFIXES) or (not path.exists() and "/" not in name and path.suffix != ".safetensors"):
        return ModelSource(None, None, None)
    if not path.is_dir():
        if not path.exists():
            raise UserError(
                f"{name!r} does not exist: give a run's folder, a checkpoint's, a .safetensors or a timm name."
            )
        return ModelSource(path, None, None)
    plain = path / "student.safetensors"
    try:
        checkpoint = resolve_checkpoint(path)
    except UserError:
        # a run whose checkpoints were deleted still has the weights that it shipped
        if weights is None and plain.is_file():
            return ModelSource(plain, None, None)
        raise
    config = checkpoint.parent.parent / "config.json"
    cfg = read_config(config) if config.is_file() else None
    return ModelSource(weights_file(checkpoint, weights), checkpoint, cfg)


def open_model(
    name: str, role: str, weights: str = "pretrained", size: int | None = None, of_run: str | None = None
) -> InspectedModel:
    """Builds the model that a name stands for.

    Args:
        name: A run's or checkpoint's folder, a consolidated .safetensors, or a timm name.
        role: `student`, `teacher` or `baseline`.
        weights: For a timm name: `pretrained`, `none` or a file.
        size: Side of its images in pixels, for a model that is built for one size; None takes the model's own.
        of_run: Which weights of a run: `student` or `ema`; None takes what the run ships.

    Raises:
        UserError: It cannot be found or built, or has no maps to show.
    """
    source = locate(name, of_run)
    card = {} if source.weights is None else read_card(source.weights)
    timm_name_or_file = name if source.weights is None else str(source.weights)
    # with its number of classes given, a model of a file is built for the new size
    model = build_model(timm_name_or_file, card.get("num_classes") if size else None, None, weights, size).eval()
    return wrap_model(model, role, name, source, card)


def wrap_model(model: nn.Module, role: str, title: str, source: ModelSource, card: dict[str, Any]) -> InspectedModel:
    """Makes a model that is built an `InspectedModel`.

    A `Teacher`, and a teacher of a known family, is run as a `Teacher`, so that its maps are the targets of distillation. All
    other models are run as a `Student`.

    Raises:
        UserError: A headless teacher, which has no maps.
    """
    network: Any
    if isinstance(model, Teacher):
        if model.headless:
            raise UserError(f"{title} is a teacher's last stage alone, which sees no images: give the whole teacher.")
        network = model
    elif role == "teacher" and isinstance(model, tuple(FAMILIES)):
        network = Teacher(model)
    else:
        cfg = source.cfg
        network = Student(model, taps=Taps(cfg.student_taps, False) if cfg and cfg.student_taps else None)
    network.eval().requires_grad_(False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    known = known_classes(network.model)
    # ImageNet's classes have numbers as folders, and words for people, of which the first is shown
    classes, folder_names = (known.schemes[-1], known.schemes[0]) if known.schemes else (None, None)
    # a convolutional model takes images of any size; one with a grid of patches is built for one size
    has_fixed_size = hasattr(network.model, "patch_embed") or isinstance(network, Teacher)
    size = Preprocessing.of(network.model).size if has_fixed_size else None
    return InspectedModel(role, title, network.to(device), classes, folder_names, known, size, card, source)


def positions_of(student: InspectedModel, other: InspectedModel) -> np.ndarray:
    """The output of another model for each class of the student, by name where both have names.

    Raises:
        UserError: They have different classes.
    """
    it_is = f"the {other.role} ({other.title})"
    if student.num_classes != other.num_classes:
        raise UserError(f"{it_is} has {other.num_classes} classes and the student {student.num_classes}")
    if other is student or not student.known.schemes or not other.known.schemes:
        return np.arange(student.num_classes)
    problems = []
    for names in student.known.schemes:
        try:
            return match_classes(other.known, other.num_classes, names, it_is, "the student").positions
        except UserError as problem:
            problems.append(problem)
    raise problems[0]


def check_same_classes(student: InspectedModel, other: InspectedModel) -> str | None:
    """How the classes of another model differ from the student's, in one line; None if they are the same."""
    try:
        positions_of(student, other)
    except UserError as error:
        return str(error).rstrip(".")
    return None
