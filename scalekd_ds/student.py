"""The student: a timm model with taps before and at its last stage, and its logits, from one forward pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from timm.models.mlp_mixer import MlpMixer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from scalekd_ds.errors import UserError
from scalekd_ds.models.build import build_model
from scalekd_ds.models.preprocessing import Preprocessing


class StudentOutput(NamedTuple):
    """before, last: (B, C, h, w) maps before and at the last stage; logits: (B, K)."""

    before: torch.Tensor
    last: torch.Tensor
    logits: torch.Tensor


class Taps(NamedTuple):
    """indices: of `forward_intermediates`; normed_last: the last map is the final normed tokens, not the raw block."""

    indices: tuple[int, int]
    normed_last: bool


def default_taps(model: nn.Module) -> Taps:
    """Where the published code taps this kind of student.

    Hierarchical models: the last two stages. Plain ViTs: the block at 3/4 of the depth, and the last block's normed
    tokens. Mixers and other models of one resolution: the third block from the end and the last one, un-normed.
    """
    info = getattr(model, "feature_info", None)
    reductions = [f["reduction"] for f in info] if isinstance(info, list) else info.reduction() if info else []
    count = len(reductions)
    if count < 2:
        raise UserError(f"{type(model).__name__} has {count} feature maps: a student needs two. Another --student?")
    # a dilated last stage has the resolution of the one before: it is a stage all the same
    if reductions[-1] != reductions[0]:
        return Taps((count - 2, count - 1), False)
    if isinstance(model, MlpMixer) or not isinstance(model, VisionTransformer):
        return Taps((max(0, count - 3), count - 1), False)
    return Taps((max(0, count * 3 // 4 - 1), count - 1), True)


def best_memory_format(model: nn.Module) -> torch.memory_format:
    """Channels-last, in which convolutions and BatchNorm are faster and a map becomes tokens by a view.

    Not for a model with a strided 1x1 convolution of fewer than 16 channels: on CPUs, oneDNN's gradient of its weight
    writes past its workspace there (oneDNN issue 6035), and the process dies.
    """
    strided = (m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and max(m.stride) > 1)
    unsafe = any(m.in_channels // m.groups < 16 for m in strided)
    return torch.contiguous_format if unsafe else torch.channels_last


class Student(nn.Module):
    """Runs a timm model once and returns its last two maps and its logits.

    Args:
        model: timm name or a built model.
        num_classes: Width of the head, for a model built by name.
        image_size: Side or (h, w) of the images in pixels, for a model built by name whose constructor takes a size.
        weights: `none`, `pretrained` or a .safetensors file, for a model built by name.
        taps: Where to tap; None is `default_taps`.
        **kwargs: Further constructor arguments, for a model built by name.

    Raises:
        UserError: A model without `forward_intermediates`, or with fewer than two maps.
    """

    def __init__(
        self,
        model: str | nn.Module,
        num_classes: int | None = None,
        image_size: int | tuple[int, int] | None = None,
        weights: str = "none",
        taps: Taps | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if isinstance(model, str):
            model = build_model(model, num_classes, kwargs, weights, image_size)
        for method in ("forward_intermediates", "forward_head"):
            if not hasattr(model, method):
                raise UserError(
                    f"{type(model).__name__} cannot be a student: it has no {method}(), as most timm models do."
                )
        self.model = model
        self.preprocessing = Preprocessing.of(model)
        self.taps = taps or default_taps(model)
        self.memory_format = best_memory_format(model)

    def forward(self, images: torch.Tensor) -> StudentOutput:
        """One forward pass over images (B, 3, H, W); the logits are those of the bare model."""
        images = images.contiguous(memory_format=self.memory_format)
        features, (before, last) = self.model.forward_intermediates(images, indices=list(self.taps.indices))
        if self.taps.normed_last:
            # forward_intermediates has normed the final tokens once already: only its prefix tokens have to go
            patches = features[:, features.shape[1] - last.shape[-2] * last.shape[-1] :]
            last = patches.transpose(1, 2).unflatten(2, last.shape[-2:])
        return StudentOutput(before, last, self.model.forward_head(features))

    @torch.no_grad()
    def shapes(self, image_size: tuple[int, int]) -> StudentOutput:
        """The output's shapes for one image of `image_size`, by a dry pass in eval mode.

        Raises:
            UserError: The model does not take that size, or does not give two maps.
        """
        parameter = next(self.model.parameters())
        images = torch.zeros(1, 3, *image_size, device=parameter.device, dtype=parameter.dtype)
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            out = self(images)
        except (RuntimeError, AssertionError, ValueError) as error:
            name = type(self.model).__name__
            raise UserError(
                f"the student ({name}) cannot take {image_size[0]}x{image_size[1]} images: {error}"
            ) from None
        finally:
            for module, mode in modes.items():
                module.training = mode
        for tap, value in zip(("before", "last"), out, strict=False):
            if value.dim() != 4:
                raise UserError(f"the student's {tap} map has shape {tuple(value.shape)}: it must be (B, C, h, w).")
        return out
