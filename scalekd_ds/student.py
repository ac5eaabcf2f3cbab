"""The student: a timm model that returns two feature maps and its logits from one forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from timm.layers import convert_sync_batchnorm
from timm.models.mlp_mixer import MlpMixer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from scalekd_ds.errors import UserError, cause_of
from scalekd_ds.models.build import build_model
from scalekd_ds.models.preprocessing import Preprocessing


class StudentOutput(NamedTuple):
    """What a student returns for one batch.

    Attributes:
        before: (B, C, h, w) map before the last stage.
        last: (B, C, h, w) map of the last stage.
        logits: (B, K).
    """

    before: torch.Tensor
    last: torch.Tensor
    logits: torch.Tensor


class Taps(NamedTuple):
    """The two feature maps that are distilled.

    Attributes:
        indices: Their indices, as timm's `forward_intermediates` counts feature maps.
        normed_last: The last map is what the model's final norm returns, not the last block's own output.
    """

    indices: tuple[int, int]
    normed_last: bool


def _reductions(model: nn.Module) -> list[int]:
    """By what each of a model's feature maps is smaller than its images; empty where the model does not say."""
    info = getattr(model, "feature_info", None)
    return [f["reduction"] for f in info] if isinstance(info, list) else list(info.reduction()) if info else []


def _check_taps(taps: Taps, model: nn.Module) -> None:
    """Raises UserError for maps that a model does not have, as a recipe's are where another student takes its place."""
    count, (before, last) = len(_reductions(model)), taps.indices
    if count and not 0 <= before < last < count:
        raise UserError(
            f"student_taps is {list(taps.indices)}, and {type(model).__name__} has the feature maps 0 to {count - 1}: give two "
            "of them, the earlier one first; --student_taps null takes those that suit it."
        )


def default_taps(model: nn.Module) -> Taps:
    """The maps that the published code distils in this kind of student.

    Hierarchical models: the last two stages. Plain ViTs: the block at 3/4 of the depth, and the last block's normed
    tokens. Mixers and other models of one resolution: the third block from the end and the last one, un-normed.

    Raises:
        UserError: A model with fewer than two feature maps.
    """
    reductions = _reductions(model)
    count = len(reductions)
    if count < 2:
        name = type(model).__name__
        raise UserError(f"{name} has {count} feature maps: a student needs two; choose another --student.")
    # first against last: a dilated last stage has the resolution of the stage before it, and is a stage all the same
    if reductions[-1] != reductions[0]:
        return Taps((count - 2, count - 1), False)
    if isinstance(model, MlpMixer) or not isinstance(model, VisionTransformer):
        return Taps((max(0, count - 3), count - 1), False)
    return Taps((max(0, count * 3 // 4 - 1), count - 1), True)


def takes_channels_last(model: nn.Module) -> bool:
    """Whether a model runs in channels-last, where convolutions are faster and a map becomes tokens without a copy.

    Not one with a strided 1x1 convolution of fewer than 16 channels: on CPUs, oneDNN's gradient of its weight writes past
    its workspace there (oneDNN issue 6035), and the process dies.
    """
    strided = (m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and max(m.stride) > 1)
    return all(m.in_channels // m.groups >= 16 for m in strided)


class Student(nn.Module):
    """Runs a timm model once and returns its last two maps and its logits.

    Args:
        model: timm name or a built model.
        num_classes: Width of the head, for a model built by name.
        image_size: Side or (h, w) of the images in pixels, for a model built by name whose constructor takes a size.
        weights: `none`, `pretrained` or a file of weights, for a model built by name.
        taps: The two maps that are distilled; None takes `default_taps`.
        **kwargs: Further constructor arguments, for a model built by name.

    Raises:
        UserError: A model without `forward_intermediates` or `forward_head`, with fewer than two maps, or without those of
            `taps`.
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
        self.model: nn.Module = model
        self.preprocessing = Preprocessing.of(model)
        if taps is not None:
            _check_taps(taps, model)
        self.taps = taps or default_taps(model)
        self.channels_last = takes_channels_last(model)

    def forward(self, images: torch.Tensor) -> StudentOutput:
        """One forward pass over images (B, 3, H, W); the logits are those of the bare model."""
        images = images.contiguous(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)
        model: Any = self.model
        features, (before, last) = model.forward_intermediates(images, indices=list(self.taps.indices))
        if self.taps.normed_last:
            # `features` are the final normed tokens; a class or register token in front of them is cut off
            patches = features[:, features.shape[1] - last.shape[-2] * last.shape[-1] :]
            last = patches.transpose(1, 2).unflatten(2, last.shape[-2:])
        return StudentOutput(before, last, model.forward_head(features))

    if TYPE_CHECKING:
        # nn.Module's own would return Any
        __call__ = forward

    def synchronise_batchnorm(self) -> None:
        """Replaces each BatchNorm by one that takes its statistics over all ranks, with the same weights and buffers."""
        # torch's own converter loses the activation that timm's BatchNormAct2d has inside
        convert_sync_batchnorm(self.model)

    @torch.no_grad()
    def shapes(self, image_size: tuple[int, int]) -> StudentOutput:
        """The output for one blank image of `image_size`, (h, w) in pixels, in eval mode: its shapes are what counts.

        Raises:
            UserError: The model does not take that size, or does not give two maps.
        """
        parameter = next(self.model.parameters())
        images = torch.zeros(1, 3, *image_size, device=parameter.device, dtype=parameter.dtype)
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            out = self(images)
        # a model that is built with odd arguments may fail in any way
        except Exception as error:
            name = type(self.model).__name__
            raise UserError(
                f"the student ({name}) cannot take {image_size[0]}x{image_size[1]} images: {cause_of(error)}"
            ) from None
        finally:
            for module, mode in modes.items():
                module.training = mode
        for name, feature_map in (("before", out.before), ("last", out.last)):
            if feature_map.dim() != 4:
                raise UserError(
                    f"the student's {name} map has shape {tuple(feature_map.shape)}: it must be (B, C, h, w); choose "
                    "another --student or --student_taps."
                )
        if out.logits.dim() != 2:
            raise UserError(
                f"the student's logits have shape {tuple(out.logits.shape)} for one image: they must be (1, classes); look "
                "at --student_kwargs."
            )
        return out
