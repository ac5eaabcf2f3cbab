"""The frozen teacher: its targets, without gradient, and its last stage, differentiable in its input (TPP).

`scalekd_ds.teacher_families` says what "the last stage" of each kind of model is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from timm.layers import RotaryEmbedding, RotaryEmbeddingCat, RotaryEmbeddingDinoV3, RotaryEmbeddingMixed
from torch import nn

from scalekd_ds.class_names import match_classes
from scalekd_ds.errors import UserError, say
from scalekd_ds.models.build import build_model
from scalekd_ds.models.known_classes import known_classes
from scalekd_ds.models.preprocessing import Preprocessing
from scalekd_ds.models.rotary import keep_rotary_embeddings
from scalekd_ds.models.window_attention import fuse_window_attention, hold_window_constants
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

# their angles do not survive 16 bits, and timm rounds what they rotate to the type of the values
_ROTARY = (RotaryEmbedding, RotaryEmbeddingCat, RotaryEmbeddingDinoV3, RotaryEmbeddingMixed)


class TeacherTargets(NamedTuple):
    """What the teacher says about one batch.

    Attributes:
        tokens: (B, P, C) output of the last stage; empty for a teacher that is used for its logits only.
        logits: (B, K), or None for a teacher without a classifier.
    """

    tokens: torch.Tensor
    logits: torch.Tensor | None


class TargetsWithoutTPP(NamedTuple):
    """The targets where stage n-1 is compared with the teacher's own stage n-1 instead of passing through TPP.

    Attributes:
        tokens: As in `TeacherTargets`.
        logits: As in `TeacherTargets`.
        before: (B, P_in, C_in) input of the teacher's last stage.
    """

    tokens: torch.Tensor
    logits: torch.Tensor | None
    before: torch.Tensor


class Teacher(nn.Module):
    """A frozen timm vision transformer, in eval mode.

    Args:
        model: timm name, path of a consolidated .safetensors, or a built model.
        image_size: Side or (h, w) of the images in pixels, for a model built by name whose constructor takes a size.
        weights: `pretrained`, `none` or a file of weights, for a model built by name.
        features: False takes any model, and uses its logits only.
        input_size: Side or (h, w) in pixels that its images are resized to; None is the size that it was built for, or
            that of its pretrained weights. Convolutional models take any size, the others only that of their grid.
        train_mode: Keeps it in train mode, with stochastic depth, as the published code does without meaning to.
        **kwargs: Further constructor arguments, for a model built by name.

    Attributes:
        num_classes: Width of its classifier; 0 where it has none.
        class_positions: (K,) int64 output of each training class, set by `match`; None leaves the logits as they are.
        same_classes: False where its classes are not those of the training images, though as many.
        family: The functions that run it and its last stage; None without features.
        last_input, last_output: `Stage` of the tokens that enter and leave the last stage; None without features.
        preprocessing: The mean, std and size of the images that it was trained on.
        headless: It is its last stage alone, built by `headless_teacher`: its targets come from elsewhere.
        title: What people read as its model.
        built_from: (name, constructor arguments, image size) that it was built from; None for a model that was built before.
        precision: The dtype of its own autocast, set by `lower_precision`; None leaves autocast to the caller.
        held_in: The dtype of all of its weights and activations, without autocast, set by `hold_in`; None elsewhere.
        engine: The DeepSpeed engine that shards the weights (set by `engine.teacher_placement`), in a tuple, so that it
            is no submodule; an empty tuple where the weights are whole.

    Raises:
        UserError: A model that cannot be built, or whose last stage is not known.
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
        self.headless = False
        self.built_from: tuple[str, dict[str, Any], int | tuple[int, int] | None] | None = None
        if isinstance(model, str):
            self.built_from = (model, kwargs, image_size)
            model = build_model(model, None, kwargs, weights, image_size)
        self.model: nn.Module = model
        self.title = type(model).__name__
        self.num_classes = int(getattr(model, "num_classes", 0) or 0)
        self.class_positions: torch.Tensor | None
        # not in the state-dict, which is the timm model's
        self.register_buffer("class_positions", None, persistent=False)
        self.same_classes = True
        self.precision: torch.dtype | None = None
        self.held_in: torch.dtype | None = None
        self.engine: tuple[Any, ...] = ()
        self.requires_grad_(False)
        self.train(False)
        if input_size is not None:
            self._resize(input_size)
        self.preprocessing = Preprocessing.of(model)
        self._check_patches()
        keep_rotary_embeddings(model)
        say(fuse_window_attention(model))
        self.family = family_of(model) if features else None
        # name of a method -> what runs in its place, where it is compiled
        self._compiled: dict[str, Callable[..., Any]] = {}
        self.last_input: Stage | None = None
        self.last_output: Stage | None = None
        if self.family is not None:
            self.last_input, self.last_output = self.family.stages(model)

    def become_headless(
        self, title: str, family: Family | None, preprocessing: Preprocessing, num_classes: int, same_classes: bool
    ) -> None:
        """Makes it the last stage of another teacher, whose weights its model has there; see `headless_teacher`.

        Args:
            title: Name of the other's model.
            family: The other's family; None where its logits alone are used.
            preprocessing: Of the other's images.
            num_classes: Of the other, whose logits come from elsewhere.
            same_classes: Whether the other's classes are those of the training images.
        """
        self.headless, self.title, self.preprocessing = True, title, preprocessing
        self.num_classes, self.same_classes = num_classes, same_classes
        self.family = family
        if family is not None:
            self.last_input, self.last_output = family.stages(self.model)

    def _check_trunk(self) -> None:
        if self.headless:
            raise ValueError(
                f"the teacher ({self.title}) is its last stage alone and takes no images: give the targets that it was cached "
                "with, as teacher_targets."
            )

    def _resize(self, size: int | tuple[int, int]) -> None:
        """Makes `size` the size of its images, where the model takes any."""
        h, w = (size, size) if isinstance(size, int) else size
        model: Any = self.model
        own = getattr(getattr(model, "patch_embed", None), "img_size", None)
        if own is not None and tuple(own) != (h, w):
            raise UserError(
                f"the teacher ({type(model).__name__}) was built for {own[0]}x{own[1]} images and cannot take "
                f"{h}x{w}: build it with img_size, or leave out --teacher_image_size."
            )
        model.pretrained_cfg = dict(getattr(model, "pretrained_cfg", None) or {}, input_size=(3, h, w))

    def match(self, classes: Sequence[str]) -> str | None:
        """Gives the logits in the order of the training classes from then on, found by name.

        Args:
            classes: Names of the training classes, as many as the teacher has.

        Returns:
            What a user should know, in one line, or None.

        Raises:
            UserError: They are other classes than the teacher's.
        """
        if self.headless:
            # its logits were put into the order of these classes when they were cached
            if not self.same_classes:
                raise UserError(f"the teacher's ({self.title}) classes are not those of the training images.")
            return None
        matched = match_classes(
            known_classes(self.model), self.num_classes, classes, "the teacher", "the set of training images"
        )
        device = next(self.model.parameters()).device
        self.class_positions = None if matched.same_order else torch.from_numpy(matched.positions).to(device)
        return matched.notice

    def _in_order(self, logits: torch.Tensor) -> torch.Tensor:
        return logits if self.class_positions is None else logits.index_select(1, self.class_positions)

    def _check_patches(self) -> None:
        """Refuses images that patches do not divide: timm would silently cut off their right and lower border."""
        embed, size = getattr(self.model, "patch_embed", None), self.preprocessing.size
        # PVT-v2's patches overlap, have no grid and take any size
        patch = getattr(embed, "patch_size", None) if hasattr(embed, "grid_size") else None
        if patch is not None and size is not None and (size[0] % patch[0] or size[1] % patch[1]):
            raise UserError(
                f"the teacher ({type(self.model).__name__}) cannot take {size[0]}x{size[1]} images: its patches are "
                f"{patch[0]}x{patch[1]} pixels; set --teacher_image_size to a multiple."
            )

    def train(self, mode: bool = True) -> Teacher:
        """Ignores `mode`, so that a parent's `train()` cannot turn on stochastic depth, which is noise in a target."""
        return super().train(self._train_mode)

    def lower_precision(self, dtype: torch.dtype) -> Teacher:
        """Holds the weights of linear layers and convolutions in `dtype`, and runs under autocast to it from then on.

        The numbers are those of autocast alone, bit for bit: norms, softmax and the residual stream keep their type.
        It saves autocast's copy of every frozen weight at every step, and half of the memory of the weights.

        Args:
            dtype: A type of 16 bits.

        Returns:
            The teacher itself.
        """
        self.precision = dtype
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(dtype)
        hold_window_constants(self.model, dtype)
        return self

    def hold_in(self, dtype: torch.dtype) -> Teacher:
        """Holds all weights in `dtype`, and computes in it from then on, whatever autocast the caller is under.

        Unlike `lower_precision` it changes the numbers: the residual stream and the norms are rounded too. Rotary
        embeddings keep their type.
        """
        self.held_in = dtype
        for module in self.modules():
            if not isinstance(module, _ROTARY):
                module._apply(lambda t: t.to(dtype) if t.is_floating_point() else t, recurse=False)
        hold_window_constants(self.model, dtype)
        return self

    def compile(self, **kwargs: Any) -> Teacher:  # type: ignore[override] # it takes torch.compile's by name alone
        """Compiles `targets` and `last_stage`, a graph each, with torch.compile; `kwargs` are its arguments.

        Weights, their names, copies and pickles are those of the teacher that is not compiled.

        Raises:
            UserError: Its weights are sharded: hooks gather and release them, which a compiled graph does not call.
        """
        if self.engine:
            raise UserError(
                "the teacher is to be compiled and is sharded: a compiled teacher has to be a replica; set --run.compile off "
                "or --run.teacher_placement replica."
            )
        self._compiled = {} if self.headless else {"targets": torch.compile(self._targets, **kwargs)}
        if self.family is not None:
            self._compiled["last_stage"] = torch.compile(self._last_stage, **kwargs)
        return self

    @property
    def is_compiled(self) -> bool:
        """Whether `compile` was called, and not undone."""
        return bool(self._compiled)

    def run_as_written(self) -> Teacher:
        """Undoes `compile`."""
        self._compiled = {}
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which are not compiled, as those of a module that torch has compiled."""
        return super().__getstate__() | {"_compiled": {}}

    @property
    def stages(self) -> tuple[Stage, Stage]:
        """`last_input` and `last_output`, the tokens before and after its last stage.

        Raises:
            ValueError: The teacher was built without features.
        """
        if self.family is None or self.last_input is None or self.last_output is None:
            raise ValueError("the teacher was built with features=False, and has no last stage: leave that out.")
        return self.last_input, self.last_output

    def _autocast(self, x: torch.Tensor) -> AbstractContextManager:
        if self.held_in is not None:
            return torch.autocast(x.device.type, enabled=False)
        return torch.autocast(x.device.type, self.precision) if self.precision else nullcontext()

    def _entering(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.held_in is None else x.to(self.held_in)

    @torch.no_grad()
    def targets(self, images: torch.Tensor) -> TeacherTargets:
        """Targets for images (B, 3, H, W) in the teacher's own normalisation and size.

        Returns:
            `TeacherTargets`, without gradient: tokens (B, P, C) on `last_output.grid`, row by row, and logits (B, K) in the
            order of the training classes where `match` has found it.

        Raises:
            ValueError: It is headless.
        """
        self._check_trunk()
        return self._compiled.get("targets", self._targets)(images)

    def _targets(self, images: torch.Tensor) -> TeacherTargets:
        """`targets` as one graph."""
        model: Any = self.model
        images = self._entering(images)
        with self._autocast(images):
            if self.family is None:
                return TeacherTargets(images.new_empty(0), self._in_order(model(images)))
            tokens, features = self.family.forward(model, images)
            # the losses' kernels need contiguous channels, which the maps of convolutional teachers do not have
            tokens = tokens.contiguous()
            logits = self._in_order(model.forward_head(features)) if self.num_classes else None
            return TeacherTargets(tokens, logits)

    @torch.no_grad()
    def before_last_stage(self, images: torch.Tensor) -> torch.Tensor:
        """The patch tokens (B, P_in, C_in) that enter its last stage, for images in its own normalisation and size.

        ScaleKD does without them: they are the target of plain feature mimicking, which TPP is compared with.

        Raises:
            UserError: A model that timm's `forward_intermediates` cannot stop right before its last stage.
            ValueError: The teacher was built without features, or is headless.
        """
        self._check_trunk()
        last_input, _ = self.stages
        model: Any = self.model
        images = self._entering(images)
        blocks = getattr(model, "blocks", None)
        is_plain_vit = blocks is not None and not hasattr(model, "layers")
        # an index from the end is right for any number of stages
        index = -1 - (last_block_count(len(blocks)) if blocks is not None and is_plain_vit else 1)
        (h, w), dim = last_input.grid, last_input.dim
        maps_BCHW = None
        if hasattr(model, "forward_intermediates"):
            with self._autocast(images):
                (maps_BCHW,) = model.forward_intermediates(
                    images, indices=[index], norm=False, stop_early=True, intermediates_only=True, output_fmt="NCHW"
                )
        if maps_BCHW is None or maps_BCHW.shape[1:] != (dim, h, w):
            raise UserError(
                f"the teacher ({type(model).__name__}) does not give its tokens before the last stage, {h}x{w} of "
                f"{dim} channels, which distilling without TPP needs: leave out --distill.tpp false."
            )
        return maps_BCHW.flatten(2).transpose(1, 2).contiguous()

    def last_stage(self, tokens: torch.Tensor) -> torch.Tensor:
        """Runs the frozen last stage; gradients flow through it to its input (TPP).

        Args:
            tokens: (B, P_in, C_in) on `last_input.grid`, row by row.

        Returns:
            (B, P, C) on `last_output.grid`.

        Raises:
            ValueError: The tokens do not have the number or the channels of `last_input`; or the teacher was built
                without features.
        """
        last_input, _ = self.stages
        h, w = last_input.grid
        if tokens.shape[1:] != (h * w, last_input.dim):
            raise ValueError(f"tokens has shape {tuple(tokens.shape)}: it must be (B, {h * w}, {last_input.dim}).")
        return self._compiled.get("last_stage", self._last_stage)(tokens)

    def _last_stage(self, tokens: torch.Tensor) -> torch.Tensor:
        """`last_stage` as one graph."""
        # `stages` has seen that there is one
        family: Any = self.family
        # without autocast, what follows takes no other type than its weights'
        dtype = None if torch.is_autocast_enabled(tokens.device.type) else tokens.dtype
        with self._autocast(tokens):
            out: torch.Tensor = family.last_stage(self.model, self._entering(tokens)).contiguous()
        return out if self.held_in is None or dtype is None else out.to(dtype)

    def forward(self, images: torch.Tensor) -> TeacherTargets:
        """Same as `targets`, also in what it raises: tokens (B, P, C) and logits (B, K) of images (B, 3, H, W)."""
        return self.targets(images)

    if TYPE_CHECKING:
        # nn.Module's own would return Any
        __call__ = forward
