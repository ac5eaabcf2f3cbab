"""The models on a sheet: a run, a checkpoint, a consolidated file or a timm model, each with its own pixels and classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

from scalekd_ds.checkpoint.layout import resolve
from scalekd_ds.checkpoint.plain_weights import weights_file
from scalekd_ds.config import RunConfig
from scalekd_ds.config.parser import read_config
from scalekd_ds.errors import UserError
from scalekd_ds.inspection.pictures import map_of
from scalekd_ds.models.build import HUBS, build_model, num_parameters
from scalekd_ds.models.card import read_card
from scalekd_ds.models.preprocessing import Preprocessing, normalisation_of
from scalekd_ds.student import Student, StudentOutput, Taps
from scalekd_ds.teacher import FAMILIES, Teacher


class Located(NamedTuple):
    """weights: .safetensors with its card, or None for a timm name; checkpoint and cfg: of the run that it is of."""

    weights: Path | None
    checkpoint: Path | None
    cfg: RunConfig | None


class Seen(NamedTuple):
    """maps: (B, C, h, w) of the last stage; logits: (B, K) or None; output: a student's, for its projectors."""

    maps: torch.Tensor
    logits: torch.Tensor | None
    output: StudentOutput | None


@dataclass(frozen=True)
class Subject:
    """A model to look at.

    Attributes:
        role: `student`, `teacher` or `baseline`.
        title: What the user called it.
        network: In eval mode.
        classes: Names to show, or None where nothing says them.
        folders: What folders of images of these classes are called.
        size: (h, w) of its images in pixels, or None for any.
        facts: Its card, or nothing.
        located: Where it was found.
    """

    role: str
    title: str
    network: Student | Teacher
    classes: list[str] | None
    folders: list[str] | None
    size: tuple[int, int] | None
    facts: dict[str, Any]
    located: Located

    @property
    def model(self) -> nn.Module:
        return self.network.model

    @property
    def num_classes(self) -> int:
        return int(getattr(self.model, "num_classes", 0) or 0)

    def normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W) in 0 to 1 -> the same in its mean, std and size."""
        if self.size is not None and self.size != tuple(pixels.shape[-2:]):
            pixels = F.interpolate(pixels, self.size, mode="bicubic", antialias=True, align_corners=False)
        mean, std = (torch.tensor(v, device=pixels.device)[:, None, None] for v in normalisation_of(self.model))
        return (pixels - mean) / std

    @torch.no_grad()
    def see(self, pixels: torch.Tensor) -> Seen:
        """What it makes of pixels (B, 3, H, W) in 0 to 1, all sides as the sheet shows them."""
        images = self.normalised(pixels)
        if isinstance(self.network, Teacher):
            tokens, logits = self.network.targets(images)
            return Seen(map_of(tokens, self.network.last_output.grid), logits, None)
        output = self.network(images)
        return Seen(output.last, output.logits if self.num_classes else None, output)

    def about(self) -> str:
        """One line: what it is, how large, how good its card says it is."""
        top1 = self.facts.get("top1")
        known = "" if top1 is None else f", top-1 {top1:.2f}% on its validation images"
        return f"{self.title}: {type(self.model).__name__}, {num_parameters(self.model) / 1e6:.2f} M{known}"


def locate(name: str, weights: str | None = None) -> Located:
    """Finds what a name stands for: a run's or checkpoint's folder, a consolidated file, or (nothing found) a timm model.

    Args:
        name: As the user gave it.
        weights: `student` or `ema`, of a run; None is what the run ships.

    Raises:
        UserError: A folder without weights, a path that does not exist, or a damaged checkpoint.
    """
    path = Path(name)
    if name.startswith(HUBS) or (not path.exists() and "/" not in name and path.suffix != ".safetensors"):
        return Located(None, None, None)
    if not path.is_dir():
        if not path.exists():
            raise UserError(
                f"{name!r} does not exist: give a run's folder, a checkpoint's, a .safetensors or a timm name."
            )
        return Located(path, None, None)
    plain = path / "student.safetensors"
    try:
        checkpoint = resolve(path)
    except UserError:
        # a run whose checkpoints were cleared away still has what it shipped
        if weights is None and plain.is_file():
            return Located(plain, None, None)
        raise
    config = checkpoint.parent.parent / "config.json"
    cfg = read_config(config) if config.is_file() else None
    return Located(weights_file(checkpoint, weights), checkpoint, cfg)


def open_subject(
    name: str, role: str, weights: str = "pretrained", size: int | None = None, of_run: str | None = None
) -> Subject:
    """Builds a model that a name stands for.

    Args:
        name: A run's or checkpoint's folder, a consolidated .safetensors, or a timm name.
        role: `student`, `teacher` or `baseline`.
        weights: For a timm name: `pretrained`, `none` or a file.
        size: Side of its images in pixels, for a timm model built for one size; None is its own.
        of_run: As `locate`'s `weights`.

    Raises:
        UserError: It cannot be found or built, or has no maps to show.
    """
    located = locate(name, of_run)
    source = name if located.weights is None else str(located.weights)
    facts = {} if located.weights is None else read_card(located.weights)
    model = build_model(source, None, None, weights, None if facts else size).eval()
    return subject_of(model, role, name, located, facts)


def subject_of(model: nn.Module, role: str, title: str, located: Located, facts: dict[str, Any]) -> Subject:
    """A built model as a subject; a teacher's map is its target where its family is known."""
    network: Student | Teacher
    if isinstance(model, Teacher):
        network = model
    elif role == "teacher" and isinstance(model, tuple(FAMILIES)):
        network = Teacher(model)
    else:
        cfg = located.cfg
        network = Student(model, taps=Taps(cfg.student_taps, False) if cfg and cfg.student_taps else None)
    network.eval().requires_grad_(False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    classes, folders = _classes(network.model, facts)
    # a convolutional model takes the sheet's images as they are; one with a grid of patches has its own size
    fixed = hasattr(network.model, "patch_embed") or isinstance(network, Teacher)
    size = Preprocessing.of(network.model).size if fixed else None
    return Subject(role, title, network.to(device), classes, folders, size, facts, located)


def _classes(model: nn.Module, facts: dict[str, Any]) -> tuple[list[str] | None, list[str] | None]:
    """(names, folders' names) of a card, or of ImageNet where a model of timm's has its classes."""
    if facts.get("classes"):
        return facts["classes"], facts["classes"]
    subset = infer_imagenet_subset(model) if getattr(model, "num_classes", 0) else None
    if subset is None:
        return None, None
    info = ImageNetInfo(subset)
    names = [info.index_to_description(i).split(",")[0] for i in range(model.num_classes)]
    return names, info.label_names()


def check_same_classes(student: Subject, other: Subject) -> str | None:
    """None where both answer in the same classes, else a line on how they differ."""
    if student.num_classes != other.num_classes:
        return f"the {other.role} ({other.title}) has {other.num_classes} classes and the student {student.num_classes}"
    if student.classes and other.classes and set(student.classes) != set(other.classes):
        first = sorted(set(other.classes) - set(student.classes))[0]
        return f"the {other.role} ({other.title}) has a class {first!r} that the student has not"
    return None
