"""The frozen teacher: targets without gradient, and its last stage, differentiable in its input (TPP).

What "the last stage" of each family is: `scalekd_ds.teacher_families`.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from scalekd_ds.errors import UserError
from scalekd_ds.models.build import build_model
from scalekd_ds.models.preprocessing import Preprocessing
from scalekd_ds.teacher_families import (
    FAMILIES,
    Family,
    Stage,
    family_of,
    last_block_count,
    register_family,
)

__all__ = [
    "FAMILIES",
    "Family",
    "Stage",
    "TargetsWithoutTPP",
    "Teacher",
    "TeacherTargets",
    "family_of",
    "last_block_count",
    "register_family",
]


class TeacherTargets(NamedTuple):
    """tokens: (B, P, C) of the last stage; logits: (B, K), or None for a teacher without a head."""

    tokens: torch.Tensor
    logits: torch.Tensor | None


class TargetsWithoutTPP(NamedTuple):
    """`TeacherTargets`, and before: (B, P_in, C_in), what the teacher's last stage is given."""

    tokens: torch.Tensor
    logits: torch.Tensor | None
    before: torch.Tensor


class Teacher(nn.Module):
    """A frozen timm vision transformer, in eval mode.

    Args:
        model: timm name, path of a consolidated .safetensors, or a built model.
        image_size: Side or (h, w) of the images in pixels, for a model built by name whose constructor takes a size.
        weights: `pretrained`, `none` or a .safetensors file, for a model built by name.
        features: False needs logits only, and takes any model.
        input_size: Side or (h, w) that its images are resized to; None is the size that it was built for, or that of its
            pretrained weights. Any size for convolutional models, that of the grid for the others.
        train_mode: Lets its stochastic depth run, as the published code does without meaning to.
        **kwargs: Further constructor arguments, for a model built by name.

    Attributes:
        last_input, last_output: `Stage` before and after the last stage; None without features.
        preprocessing: The mean, std and size of the images that it was trained on.
        precision: Autocast's dtype after `lower`, else None: that of the caller.
        engine: The DeepSpeed engine that shards the weights (`engine.teacher_placement`), in a tuple, so that it is no
            submodule; empty where they are whole.

    Raises:
        UserError: A model that has no last stage we know, or that cannot be built.
    """

    def __init__(
        self,
        model: str | nn.Module,
        image_size: int | tuple[int, int] | None = None,
        weights: str = "pretrained",
        features: bool = True,
        input_size: int | tuple[int, int] | None = None,
        train_mode: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self._train_mode = train_mode
        if isinstance(model, str):
            model = build_model(model, None, kwargs, weights, image_size)
        self.model = model
        self.num_classes = int(getattr(model, "num_classes", 0) or 0)
        self.precision: torch.dtype | None = None
        self.engine: tuple[Any, ...] = ()
        self.requires_grad_(False)
        self.train(False)
        if input_size is not None:
            self._resize(input_size)
        self.preprocessing = Preprocessing.of(model)
        self._check_patches()
        self.family = family_of(model) if features else None
        self.last_input, self.last_output = self.family.stages(model) if features else (None, None)

    def _resize(self, size: int | tuple[int, int]) -> None:
        size = (size, size) if isinstance(size, int) else tuple(size)
        built = getattr(getattr(self.model, "patch_embed", None), "img_size", None)
        if built is not None and tuple(built) != size:
            raise UserError(
                f"the teacher ({type(self.model).__name__}) was built for {built[0]}x{built[1]} images and cannot take "
                f"{size[0]}x{size[1]}: build it with img_size, or leave out --teacher_image_size."
            )
        self.model.pretrained_cfg = dict(getattr(self.model, "pretrained_cfg", None) or {}, input_size=(3, *size))

    def _check_patches(self) -> None:
        """timm would cut the right and lower border off without a word."""
        embed, size = getattr(self.model, "patch_embed", None), self.preprocessing.size
        # PVT's patches overlap and have no grid
        patch = getattr(embed, "patch_size", None) if hasattr(embed, "grid_size") else None
        if patch is not None and size is not None and (size[0] % patch[0] or size[1] % patch[1]):
            raise UserError(
                f"the teacher ({type(self.model).__name__}) cannot take {size[0]}x{size[1]} images: its patches are "
                f"{patch[0]}x{patch[1]} pixels; set --teacher_image_size to a multiple."
            )

    def train(self, mode: bool = True) -> Teacher:
        """Stays in its mode whatever a parent asks: stochastic depth in a target is noise."""
        return super().train(self._train_mode)

    def lower(self, dtype: torch.dtype) -> Teacher:
        """Holds the weights of linear layers and convolutions in `dtype`, and runs under autocast to it from then on.

        The numbers are autocast's own, bit for bit: norms, softmax and the residual stream stay as they are. What goes
        is autocast's copy of every frozen weight at every step, and half of the memory.
        """
        self.precision = dtype
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(dtype)
        return self

    def compile(self, **kwargs: Any) -> Teacher:
        """Compiles `targets` and `last_stage` with torch.compile: frozen and of one shape, they are compiled once.

        Raises:
            UserError: Its weights are sharded: they come and go with hooks that a compiled graph does not call.
        """
        if self.engine:
            raise UserError(
                "run.compile_teacher is true and the teacher is sharded: a compiled teacher has to be a replica; set "
                "--run.compile_teacher false or --run.teacher_placement replica."
            )
        if self.family is not None:
            forward, last_stage = (torch.compile(f, **kwargs) for f in (self.family.forward, self.family.last_stage))
            self.family = replace(self.family, forward=forward, last_stage=last_stage)
        else:
            self.model.compile(**kwargs)
        return self

    def _autocast(self, x: torch.Tensor) -> Any:
        return torch.autocast(x.device.type, self.precision) if self.precision else nullcontext()

    @torch.no_grad()
    def targets(self, images: torch.Tensor) -> TeacherTargets:
        """Last-stage tokens (B, P, C) and logits (B, K) of images (B, 3, H, W) in the teacher's own normalisation."""
        with self._autocast(images):
            if self.family is None:
                return TeacherTargets(images.new_empty(0), self.model(images))
            tokens, features = self.family.forward(self.model, images)
            # the losses' kernels read whole rows of channels; convolutional teachers and ViTs without a prefix have none
            tokens = tokens.contiguous()
            return TeacherTargets(tokens, self.model.forward_head(features) if self.num_classes else None)

    @torch.no_grad()
    def before_last_stage(self, images: torch.Tensor) -> torch.Tensor:
        """The patch tokens (B, P_in, C_in) that its own last stage gets for images in its normalisation: no target of
        ScaleKD's, but of the feature mimicking that TPP is compared with.

        Raises:
            UserError: A registered family whose last stage is not one that timm's `forward_intermediates` can stop before.
        """
        blocks = getattr(self.model, "blocks", None)
        plain = blocks is not None and not hasattr(self.model, "layers")
        # counted from the end, which is known for any number of stages
        index = -1 - (last_block_count(len(blocks)) if plain else 1)
        (h, w), dim = self.last_input.grid, self.last_input.dim
        maps_BCHW = None
        if hasattr(self.model, "forward_intermediates"):
            with self._autocast(images):
                (maps_BCHW,) = self.model.forward_intermediates(
                    images, indices=[index], norm=False, stop_early=True, intermediates_only=True, output_fmt="NCHW"
                )
        if maps_BCHW is None or maps_BCHW.shape[1:] != (dim, h, w):
            raise UserError(
                f"the teacher ({type(self.model).__name__}) does not give its tokens before the last stage, {h}x{w} of {dim} "
                "channels, which distilling without TPP needs: leave out --distill.tpp false."
            )
        return maps_BCHW.flatten(2).transpose(1, 2).contiguous()

    def last_stage(self, tokens: torch.Tensor) -> torch.Tensor:
        """The frozen last stage, with gradients to its input (TPP).

        Args:
            tokens: (B, P_in, C_in) on `last_input.grid`, row by row.

        Returns:
            (B, P, C) on `last_output.grid`.

        Raises:
            ValueError: Another number of tokens or channels.
        """
        h, w = self.last_input.grid
        if tokens.shape[1:] != (h * w, self.last_input.dim):
            raise ValueError(f"tokens has shape {tuple(tokens.shape)}: it must be (B, {h * w}, {self.last_input.dim}).")
        with self._autocast(tokens):
            return self.family.last_stage(self.model, tokens).contiguous()

    def forward(self, images: torch.Tensor) -> TeacherTargets:
        """Same as `targets`."""
        return self.targets(images)
