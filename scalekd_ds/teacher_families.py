"""What "the last stage" of a teacher is, by family of models, and the grid, channels and heads around it.

Swin, Swin-v2                   layers[-1] with its down-sampling, then the final norm; the target is normed.
ConvNeXt, PVT-v2                stages[-1] with its down-sampling, on maps of any size; no norm after it.
ViT, DeiT, DINOv2, CLIP,        the last 2 of 24 blocks, in proportion for other depths, on patch tokens alone: no class
SigLIP, BEiT, EVA, DINOv3       token, no final norm; the target is the un-normed patch tokens of the last block.

In the first two, the teacher's own tokens before the last stage, sent through `last_stage`, give its target exactly. In
the third they do so where the model has no prefix tokens (class or register tokens; SigLIP has none); elsewhere the two
differ by what patches gather from prefix tokens by attention.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.models.beit import Beit
from timm.models.convnext import ConvNeXt
from timm.models.eva import Eva
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from scalekd_ds.errors import UserError
from scalekd_ds.models.preprocessing import Preprocessing


@dataclass(frozen=True)
class Stage:
    """The tokens before or after the teacher's last stage.

    Attributes:
        grid: (h, w) of the tokens.
        dim: Channels.
        heads: Heads of the attention there, which the projectors take unless told otherwise.
    """

    grid: tuple[int, int]
    dim: int
    heads: int


@dataclass(frozen=True)
class Family:
    """How ScaleKD runs one kind of teacher.

    Attributes:
        forward: (model, images) -> (target tokens (B, P, C), features that the model's `forward_head` takes).
        last_stage: (model, tokens (B, P_in, C_in)) -> (B, P, C), differentiable in the tokens.
        stages: model -> (`Stage` before the last stage, `Stage` after it).
    """

    # the model as Any: a function of a family takes its own class, whose attributes it reads
    forward: Callable[[Any, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    last_stage: Callable[[Any, torch.Tensor], torch.Tensor]
    stages: Callable[[Any], tuple[Stage, Stage]]


def _swin_forward(model: Any, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    features_BHWC = model.forward_features(images)
    return features_BHWC.flatten(1, 2), features_BHWC


def _swin_last_stage(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    stage = model.layers[-1]
    return model.norm(stage(tokens.unflatten(1, tuple(stage.input_resolution)))).flatten(1, 2)


def _swin_stages(model: Any) -> tuple[Stage, Stage]:
    if len(model.layers) < 2:
        raise UserError("the teacher has one stage: ScaleKD needs a stage before the last one.")
    last, before = model.layers[-1], model.layers[-2]
    return (
        Stage(tuple(last.input_resolution), last.dim, before.blocks[-1].attn.num_heads),
        Stage(tuple(last.output_resolution), model.num_features, last.blocks[-1].attn.num_heads),
    )


def default_heads(dim: int) -> int:
    """Projector heads for a teacher without attention: 32 channels a head as in Swin, or the next fewer that divide."""
    return next(heads for heads in range(max(1, dim // 32), 0, -1) if dim % heads == 0)


def _tokens_of(x_BCHW: torch.Tensor) -> torch.Tensor:
    return x_BCHW.flatten(2).transpose(1, 2)


def _map_forward(model: Any, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    features, maps_BCHW = model.forward_intermediates(images, indices=1, norm=False)
    return _tokens_of(maps_BCHW[0]), features


def _map_last_stage(model: Any, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    return _tokens_of(model.stages[-1](tokens.transpose(1, 2).unflatten(2, grid)))


def _heads_of(stage: Any, dim: int) -> int:
    return getattr(getattr(stage.blocks[-1], "attn", None), "num_heads", None) or default_heads(dim)


@torch.no_grad()
def _map_family(model: Any) -> Family:
    """The family of a convolutional model, which keeps no grid: one forward pass at its own image size tells it."""
    name = type(model).__name__
    if len(model.stages) < 2:
        raise UserError("the teacher has one stage: ScaleKD needs a stage before the last one.")
    size = Preprocessing.of(model).size
    if size is None:
        raise UserError(f"the teacher ({name}) does not say the size of its images: set Teacher(..., input_size=...).")
    shapes: list[torch.Size] = []
    handle = model.stages[-1].register_forward_hook(
        lambda _, inputs, output: shapes.extend((inputs[0].shape, output.shape))
    )
    parameter = next(model.parameters())
    try:
        _map_forward(model, torch.zeros(1, 3, *size, device=parameter.device, dtype=parameter.dtype))
    except RuntimeError as error:
        raise UserError(f"the teacher ({name}) cannot take {size[0]}x{size[1]} images: {error}") from None
    finally:
        handle.remove()
    before, after = (
        Stage((shape[2], shape[3]), shape[1], _heads_of(stage, shape[1]))
        for shape, stage in zip(shapes, list(model.stages)[-2:], strict=True)
    )
    last_stage = partial(_map_last_stage, grid=before.grid)
    # a function of a module, not a lambda: distillers are pickled
    return Family(_map_forward, last_stage, partial(_known_stages, (before, after)))


def _known_stages(stages: tuple[Stage, Stage], _: nn.Module) -> tuple[Stage, Stage]:
    return stages


def last_block_count(depth: int) -> int:
    """Number of blocks in a plain ViT's last stage: 2 of 24, in proportion for other depths, at least one."""
    return max(1, round(2 * depth / 24))


def _vit_forward(model: Any, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    features, (tokens,) = model.forward_intermediates(images, indices=1, norm=False, output_fmt="NLC")
    return tokens, features


def _among_patches(block: Any, tokens: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    """Runs a transformer block on patch tokens alone.

    Only what depends on the number of prefix tokens is replaced: rotary embeddings skip `num_prefix_tokens`, and BEiT's bias
    table has a row and a column for the class token.
    """
    attn = block.attn
    if getattr(attn, "relative_position_bias_table", None) is not None:
        block = _without_bias_of_class_token(block)
    prefix = getattr(attn, "num_prefix_tokens", 0)
    if not prefix or "rope" not in arguments:
        out: torch.Tensor = block(tokens, **arguments)
        return out
    # for the call alone, and not in a copy, which torch.compile does not follow
    attn.num_prefix_tokens = 0
    try:
        out = block(tokens, **arguments)
    finally:
        attn.num_prefix_tokens = prefix
    return out


def _without_bias_of_class_token(block: Any) -> Any:
    """A shallow copy of a BEiT block, which shares parameters and hooks with the original."""
    attn = copy.copy(block.attn)
    bias = attn._get_rel_pos_bias()[..., 1:, 1:]
    attn._get_rel_pos_bias = lambda: bias
    block = copy.copy(block)
    block._modules = {**block._modules, "attn": attn}
    return block


def _block_arguments(model: Any, first: int) -> list[dict[str, Any]]:
    """Arguments of each block from `first` on beside its tokens: rotary embeddings, or BEiT's shared position bias."""
    count = len(model.blocks) - first
    if getattr(model, "rope", None) is not None:
        # the rotary module of models of any size, such as DINOv3, keeps no grid of its own
        has_grid = getattr(model.rope, "feat_shape", None) is not None
        rope = model.rope.get_embed() if has_grid else model.rope.get_embed(shape=model.patch_embed.grid_size)
        if getattr(model, "rope_mixed", False):
            return [{"rope": rope[i]} for i in range(first, len(model.blocks))]
        return [{"rope": rope}] * count
    if getattr(model, "rel_pos_bias", None) is not None:
        bias = model.rel_pos_bias()[..., 1:, 1:]
        return [{"shared_rel_pos_bias": bias}] * count
    return [{}] * count


def _vit_last_stage(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    first = len(model.blocks) - last_block_count(len(model.blocks))
    for block, arguments in zip(list(model.blocks)[first:], _block_arguments(model, first), strict=True):
        tokens = _among_patches(block, tokens, arguments)
    return tokens


def _vit_stages(model: Any) -> tuple[Stage, Stage]:
    if not hasattr(model.blocks[-1], "attn"):
        raise UserError(
            f"the teacher's blocks are {type(model.blocks[-1]).__name__}: they have no separate attention, and it "
            "cannot be a ScaleKD teacher; --distill.features false distils from logits alone."
        )
    if len(model.blocks) < 2:
        raise UserError("the teacher has one block: ScaleKD needs a block before the last stage.")
    stage = Stage(tuple(model.patch_embed.grid_size), model.embed_dim, model.blocks[-1].attn.num_heads)
    return stage, stage


_SWIN = Family(_swin_forward, _swin_last_stage, _swin_stages)
_VIT = Family(_vit_forward, _vit_last_stage, _vit_stages)

# class of model -> its family, or a function that makes the family of a built model
FAMILIES: dict[type[nn.Module], Family | Callable[[Any], Family]] = {
    SwinTransformer: _SWIN,
    SwinTransformerV2: _SWIN,
    ConvNeXt: _map_family,
    PyramidVisionTransformerV2: _map_family,
    VisionTransformer: _VIT,
    Beit: _VIT,
    Eva: _VIT,
}


def register_family(model_class: type[nn.Module], family: Family | Callable[[Any], Family]) -> None:
    """Lets models of `model_class` and its subclasses be teachers.

    Args:
        model_class: Class of the teacher.
        family: Its `Family`; or, for a model that keeps no grid of its own, a function that takes the built model, in
            eval mode, and returns the `Family`.
    """
    FAMILIES[model_class] = family


def family_of(model: nn.Module) -> Family:
    """The family of a built model, by its class or the nearest base class that is registered.

    Raises:
        UserError: No class of it is registered, or its family refuses it.
    """
    for model_class in type(model).__mro__:
        if model_class in FAMILIES:
            family = FAMILIES[model_class]
            return family if isinstance(family, Family) else family(model)
    known = ", ".join(c.__name__ for c in FAMILIES)
    raise UserError(
        f"{type(model).__name__} cannot be a ScaleKD teacher: its last stage is not known. Families that can: {known}; "
        "scalekd_ds.teacher.register_family adds one; --distill.features false distils from logits alone."
    )
