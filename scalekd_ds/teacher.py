"""The frozen teacher: targets without gradient, and its last stage, differentiable in its input (TPP).

What "the last stage" is, by family:
    Swin, Swin-v2               layers[-1] with its down-sampling, then the final norm; the target is normed.
    ViT, DeiT, DINOv2, CLIP,    the last 2 of 24 blocks, in proportion for other depths, on patch tokens alone: no class
    BEiT, EVA, EVA-02, DINOv3   token, no final norm; the target is the un-normed patch tokens of the last block.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from scalekd_ds.errors import UserError
from scalekd_ds.models import Preprocessing, build_model


class TeacherTargets(NamedTuple):
    """tokens: (B, P, C) of the last stage; logits: (B, K), or None for a teacher without a head."""

    tokens: torch.Tensor
    logits: torch.Tensor | None


@dataclass(frozen=True)
class Stage:
    """Tokens at one place of the teacher: grid (h, w), channels, and the heads of the attention there."""

    grid: tuple[int, int]
    dim: int
    heads: int


@dataclass(frozen=True)
class Family:
    """How to read one kind of teacher.

    Attributes:
        forward: (model, images) -> (tokens (B, P, C), features that `forward_head` takes).
        last_stage: (model, tokens (B, P_in, C_in)) -> (B, P, C).
        stages: model -> (input of the last stage, its output).
    """

    forward: Callable[[nn.Module, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    last_stage: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    stages: Callable[[nn.Module], tuple[Stage, Stage]]


def _swin_forward(model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    features_BHWC = model.forward_features(images)
    return features_BHWC.flatten(1, 2), features_BHWC


def _swin_last_stage(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    stage = model.layers[-1]
    return model.norm(stage(tokens.unflatten(1, tuple(stage.input_resolution)))).flatten(1, 2)


def _swin_stages(model: nn.Module) -> tuple[Stage, Stage]:
    if len(model.layers) < 2:
        raise UserError("the teacher has one stage: ScaleKD needs a stage before the last one.")
    last, before = model.layers[-1], model.layers[-2]
    return (
        Stage(tuple(last.input_resolution), last.dim, before.blocks[-1].attn.num_heads),
        Stage(tuple(last.output_resolution), model.num_features, last.blocks[-1].attn.num_heads),
    )


def last_block_count(depth: int) -> int:
    """Blocks in a plain ViT's last stage: 2 of 24, in proportion for other depths, at least one."""
    return max(1, round(2 * depth / 24))


def _vit_forward(model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    features, taps = model.forward_intermediates(images, indices=1, norm=False, output_fmt="NLC")
    return taps[0], features


def _patch_only(block: nn.Module) -> nn.Module:
    """A shallow copy of a transformer block that attends among patch tokens alone.

    Parameters and hooks are shared with the original; only what counts prefix tokens is replaced: rotary embeddings
    skip `num_prefix_tokens`, and BEiT's bias table has a row for the class token.
    """
    attn = block.attn
    has_bias = getattr(attn, "relative_position_bias_table", None) is not None
    if not has_bias and not getattr(attn, "num_prefix_tokens", 0):
        return block
    attn = copy.copy(attn)
    if has_bias:
        bias = attn._get_rel_pos_bias()[..., 1:, 1:]
        attn._get_rel_pos_bias = lambda: bias
    if hasattr(attn, "num_prefix_tokens"):
        attn.num_prefix_tokens = 0
    block = copy.copy(block)
    block._modules = {**block._modules, "attn": attn}
    return block


def _block_arguments(model: nn.Module, first: int) -> list[dict[str, Any]]:
    """What each block of the last stage takes beside its tokens: rotary embeddings, or BEiT's shared bias."""
    count = len(model.blocks) - first
    if getattr(model, "rope", None) is not None:
        # DINOv3 and other any-size models keep no grid of their own in the rotary module
        has_grid = getattr(model.rope, "feat_shape", None) is not None
        rope = model.rope.get_embed() if has_grid else model.rope.get_embed(shape=model.patch_embed.grid_size)
        if getattr(model, "rope_mixed", False):
            return [{"rope": rope[i]} for i in range(first, len(model.blocks))]
        return [{"rope": rope}] * count
    if getattr(model, "rel_pos_bias", None) is not None:
        bias = model.rel_pos_bias()[..., 1:, 1:]
        return [{"shared_rel_pos_bias": bias}] * count
    return [{}] * count


def _vit_last_stage(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    first = len(model.blocks) - last_block_count(len(model.blocks))
    for block, arguments in zip(list(model.blocks)[first:], _block_arguments(model, first), strict=True):
        tokens = _patch_only(block)(tokens, **arguments)
    return tokens


def _vit_stages(model: nn.Module) -> tuple[Stage, Stage]:
    if not hasattr(model.blocks[-1], "attn"):
        raise UserError(f"the teacher's blocks are {type(model.blocks[-1]).__name__}: they have no separate attention.")
    if len(model.blocks) < 2:
        raise UserError("the teacher has one block: ScaleKD needs a block before the last stage.")
    stage = Stage(tuple(model.patch_embed.grid_size), model.embed_dim, model.blocks[-1].attn.num_heads)
    return stage, stage


_SWIN = Family(_swin_forward, _swin_last_stage, _swin_stages)
_VIT = Family(_vit_forward, _vit_last_stage, _vit_stages)

FAMILIES: dict[type[nn.Module], Family] = {
    SwinTransformer: _SWIN,
    SwinTransformerV2: _SWIN,
    VisionTransformer: _VIT,
    Beit: _VIT,
    Eva: _VIT,
}


def register_family(model_class: type[nn.Module], family: Family) -> None:
    """Lets models of `model_class` be teachers; see `Family` for the three functions it needs."""
    FAMILIES[model_class] = family


def family_of(model: nn.Module) -> Family:
    """The family of a model.

    Raises:
        UserError: No last stage is known for its class.
    """
    for model_class in type(model).__mro__:
        if model_class in FAMILIES:
            return FAMILIES[model_class]
    known = ", ".join(c.__name__ for c in FAMILIES)
    raise UserError(
        f"{type(model).__name__} cannot be a ScaleKD teacher: its last stage is not known. Families that can: {known}; "
        "scalekd_ds.teacher.register_family adds one; --distill.features false distils from logits alone."
    )


class Teacher(nn.Module):
    """A frozen timm vision transformer, always in eval mode.

    Args:
        model: timm name, path of a consolidated .safetensors, or a built model.
        image_size: Side of the images in pixels, for a model built by name.
        weights: `pretrained`, `none` or a .safetensors file, for a model built by name.
        features: False needs logits only, and takes any model.
        **kwargs: Further constructor arguments, for a model built by name.

    Attributes:
        last_input, last_output: `Stage` before and after the last stage; None without features.
        preprocessing: The mean, std and size of the images that it was trained on.
        precision: Autocast's dtype after `lower`, else None: that of the caller.

    Raises:
        UserError: A model that has no last stage we know, or that cannot be built.
    """

    def __init__(
        self,
        model: str | nn.Module,
        image_size: int | None = None,
        weights: str = "pretrained",
        features: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if isinstance(model, str):
            model = build_model(model, None, kwargs, weights, image_size)
        self.family = family_of(model) if features else None
        self.last_input, self.last_output = self.family.stages(model) if features else (None, None)
        self.model = model
        self.preprocessing = Preprocessing.of(model)
        self._check_patches()
        self.num_classes = int(getattr(model, "num_classes", 0) or 0)
        self.precision: torch.dtype | None = None
        self.requires_grad_(False)
        self.train(False)

    def _check_patches(self) -> None:
        """timm would cut the right and lower border off without a word."""
        patch, size = getattr(getattr(self.model, "patch_embed", None), "patch_size", None), self.preprocessing.size
        if patch is not None and size is not None and (size[0] % patch[0] or size[1] % patch[1]):
            raise UserError(
                f"the teacher ({type(self.model).__name__}) cannot take {size[0]}x{size[1]} images: its patches are "
                f"{patch[0]}x{patch[1]} pixels; set --teacher_image_size to a multiple."
            )

    def train(self, mode: bool = True) -> Teacher:
        """Stays in eval mode whatever a parent asks: stochastic depth in a target is noise."""
        return super().train(False)

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
        """Compiles `targets` and `last_stage` with torch.compile: frozen and of one shape, they are compiled once."""
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
            return TeacherTargets(tokens, self.model.forward_head(features) if self.num_classes else None)

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
            return self.family.last_stage(self.model, tokens)

    def forward(self, images: torch.Tensor) -> TeacherTargets:
        """Same as `targets`."""
        return self.targets(images)
