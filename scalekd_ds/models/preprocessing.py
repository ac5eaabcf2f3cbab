"""How a model wants its pixels."""

from __future__ import annotations

from dataclasses import dataclass

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn


@dataclass(frozen=True)
class Preprocessing:
    """How a model wants its pixels: mean and std in units of 0 to 1, None where nothing says; size (h, w) in pixels."""

    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    size: tuple[int, int] | None

    @classmethod
    def of(cls, model: nn.Module) -> Preprocessing:
        """Read from a timm model's `pretrained_cfg` and, for the size, from its patch embedding where it has one."""
        cfg = getattr(model, "pretrained_cfg", None) or {}
        size = getattr(getattr(model, "patch_embed", None), "img_size", None) or cfg.get("input_size", (0, 0, 0))[1:]
        size = (size, size) if isinstance(size, int) else tuple(size)
        mean, std = cfg.get("mean"), cfg.get("std")
        return cls(tuple(mean) if mean else None, tuple(std) if std else None, size if all(size) else None)


def normalisation_of(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std that the model's pixels are normalised with, in units of 0 to 1; ImageNet's where it says nothing."""
    own = Preprocessing.of(model)
    return own.mean or IMAGENET_DEFAULT_MEAN, own.std or IMAGENET_DEFAULT_STD
