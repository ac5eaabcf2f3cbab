"""The mean, std and size of the images that a model was trained on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn


@dataclass(frozen=True)
class Preprocessing:
    """The images that a model was trained on. Each attribute that is None is not said by the model.

    Attributes:
        mean: Mean of each channel that its images are normalised with, for pixels from 0 to 1.
        std: Standard deviation of each channel that they are normalised with.
        size: (h, w) of its images in pixels.
        interpolation: Filter with which its images are resized, where this package has it.
        crop_pct: Share of the shorter side that the centre crop keeps, as timm has it.
        squashes: Its images were resized to squares, whatever their shape.
    """

    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    size: tuple[int, int] | None
    interpolation: str | None = None
    crop_pct: float | None = None
    squashes: bool = False

    @classmethod
    def of(cls, model: nn.Module) -> Preprocessing:
        """Reads a timm model's `pretrained_cfg` and, for the size, its patch embedding where it has one."""
        cfg = getattr(model, "pretrained_cfg", None) or {}
        size = getattr(getattr(model, "patch_embed", None), "img_size", None) or cfg.get("input_size", (0, 0, 0))[1:]
        size = (size, size) if isinstance(size, int) else tuple(size)
        mean, std = cfg.get("mean"), cfg.get("std")
        interpolation = cfg.get("interpolation")
        return cls(
            tuple(mean) if mean else None,
            tuple(std) if std else None,
            size if all(size) else None,
            interpolation if interpolation in ("bilinear", "bicubic") else None,
            cfg.get("crop_pct"),
            cfg.get("crop_mode") == "squash",
        )

    def shorter_side(self, image_size: int) -> int | None:
        """The shorter side before the centre crop of `image_size` pixels, as timm rounds it; None is this package's own."""
        return math.floor(image_size / self.crop_pct) if self.crop_pct else None


def normalisation_of(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) that a model's images are normalised with, for pixels from 0 to 1; by default ImageNet's."""
    own = Preprocessing.of(model)
    return own.mean or IMAGENET_DEFAULT_MEAN, own.std or IMAGENET_DEFAULT_STD


def cut_off_notice(model: nn.Module, image_size: int) -> str | None:
    """One line where a model's patches do not divide its images, whose right and lower border it then does not see."""
    embed = getattr(model, "patch_embed", None)
    # PVT-v2's patches overlap, have no grid and take any size; some models fill the last patches up
    if not hasattr(embed, "grid_size") or getattr(embed, "dynamic_img_pad", False):
        return None
    patch = max(getattr(embed, "patch_size", None) or (1, 1))
    if image_size % patch == 0:
        return None
    return (
        f"the patches of {type(model).__name__} are {patch} pixels and its images {image_size}: it does not see the last "
        f"{image_size % patch} at the right and lower border; a multiple of {patch} loses none"
    )
