"""Converts the parameters of mmpretrain's (formerly mmcls') Swin, ViT, BEiT/EVA and ResNet classifiers to timm's names.

The published ScaleKD teachers and students have mmpretrain's names. Here they come without `backbone.`, which
`load_weights.strip_prefixes` has removed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch

State = Mapping[str, torch.Tensor]


def layout(names: Iterable[str]) -> str | None:
    """Which of mmpretrain's layouts the names are in: `swin`, `vit` (also BEiT and EVA), `resnet`, or None of these."""
    names = list(names)
    if any(".attn.w_msa." in n for n in names):
        return "swin"
    if any(re.match(r"layers\.\d+\.ln1\.", n) for n in names):
        return "vit"
    if any(n.startswith("layer1.0.") for n in names) and any(n.startswith(("head.fc.", "stem.0.conv.")) for n in names):
        return "resnet"
    return None


def to_timm(state: State, model_names: Iterable[str]) -> dict[str, torch.Tensor]:
    """`state` with timm's names, and its tensors in timm's order; a copy of it where it has no layout of mmpretrain's.

    Args:
        state: Tensors of any shape by name, without `backbone.`.
        model_names: Names of the timm model's parameters, which decide where mmpretrain's layout leaves a choice.
    """
    convert = {"swin": _swin, "vit": _vit, "resnet": _resnet}.get(layout(state) or "")
    return convert(state, set(model_names)) if convert else dict(state)


def patch_merging_order(channels: int) -> torch.Tensor:
    """Indices (4 * channels,) that reorder the channels of a merged 2x2 patch from mmpretrain's order to timm's.

    mmpretrain takes nn.Unfold's order: for each channel, its four pixels row by row. timm takes the four pixels column
    by column, each with all its channels.
    """
    column_by_column = [0, 2, 1, 3]
    return torch.tensor([c * 4 + pixel for pixel in column_by_column for c in range(channels)])


def _swin(state: State, model_names: set[str]) -> dict[str, torch.Tensor]:
    converted = {}
    for name, value in state.items():
        if name.endswith("relative_position_index"):
            continue
        if ".downsample." in name:
            value = value[..., patch_merging_order(value.shape[-1] // 4)]
            # mmpretrain down-samples at the end of a stage, timm at the start of the next one
            name = re.sub(r"^stages\.(\d+)\.", lambda m: f"layers.{int(m[1]) + 1}.", name)
        name = re.sub(r"^stages\.", "layers.", name).replace(".attn.w_msa.", ".attn.")
        name = re.sub(r"^norm3\.", "norm.", name)
        converted[_rename_shared_parts(name)] = value
    return converted


def _vit(state: State, model_names: set[str]) -> dict[str, torch.Tensor]:
    converted = {}
    for name, value in state.items():
        if name.endswith("relative_position_index"):
            continue
        name = re.sub(r"^layers\.(\d+)\.ln([12])\.", r"blocks.\1.norm\2.", name)
        name = re.sub(r"^layers\.", "blocks.", name)
        # mmpretrain's ln1 norms every token, its ln2 their mean
        name = re.sub(r"^ln1\.", "norm.", re.sub(r"^ln2\.", "fc_norm.", name))
        name = _rename_shared_parts(re.sub(r"^head\.(fc|layers\.head)\.", "head.", name))
        q_bias = name.replace("attn.qkv.bias", "attn.q_bias")
        if name not in model_names and q_bias in model_names:
            # timm's BEiT has no bias of k: it would shift all scores of a query alike, which softmax does not see
            converted[q_bias], _, converted[name.replace("attn.qkv.bias", "attn.v_bias")] = value.chunk(3)
        else:
            converted[name] = value
    return converted


def _resnet(state: State, model_names: set[str]) -> dict[str, torch.Tensor]:
    # ResNetV1d's deep stem: three convolutions with a norm and a ReLU after each but, in timm, the last
    stem = {"0.conv": "conv1.0", "0.bn": "conv1.1", "1.conv": "conv1.3", "1.bn": "conv1.4", "2.conv": "conv1.6"}
    stem["2.bn"] = "bn1"

    def downsample(m: re.Match[str]) -> str:
        # in a block of stride 1, timm has an identity before the convolution where mmpretrain has nothing
        shift = f"{m[1]}.0.weight" in state and f"{m[1]}.2.weight" in model_names
        return f"{m[1]}.{int(m[2]) + shift}."

    converted = {}
    for name, value in state.items():
        name = re.sub(r"^stem\.(\d\.\w+)", lambda m: stem.get(m[1], m[0]), name)
        name = re.sub(r"^(layer\d+\.0\.downsample)\.(\d)\.", downsample, name)
        converted[re.sub(r"^head\.fc\.", "fc.", name)] = value
    return converted


def _rename_shared_parts(name: str) -> str:
    """timm's names for the feed-forward part and the patch embedding, which Swin and ViT share."""
    name = name.replace("ffn.layers.0.0.", "mlp.fc1.").replace("ffn.layers.1.", "mlp.fc2.")
    return name.replace("patch_embed.projection.", "patch_embed.proj.")
