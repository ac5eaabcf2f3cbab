"""Parameter names of mmpretrain's (formerly mmcls') Swin, ViT, BEiT/EVA and ResNet classifiers, as timm has them.

The published ScaleKD teachers and students are in this layout. Names come without `backbone.`, as `weights` strips it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch

State = Mapping[str, torch.Tensor]


def layout(names: Iterable[str]) -> str | None:
    """`swin`, `vit` (BEiT and EVA as well) or `resnet` for names in mmpretrain's layout, else None."""
    names = list(names)
    if any(".attn.w_msa." in n for n in names):
        return "swin"
    if any(re.match(r"layers\.\d+\.ln1\.", n) for n in names):
        return "vit"
    if any(n.startswith("layer1.0.") for n in names) and any(n.startswith(("head.fc.", "stem.0.conv.")) for n in names):
        return "resnet"
    return None


def to_timm(state: State, own: Iterable[str]) -> dict[str, torch.Tensor]:
    """`state` with timm's names, and its tensors in timm's order; unchanged where the layout is another one.

    Args:
        state: Names without `backbone.` -> tensors.
        own: The model's names, where the layout leaves a choice (BEiT's biases of q and v, or one of qkv).
    """
    convert = {"swin": _swin, "vit": _vit, "resnet": _resnet}.get(layout(state))
    return convert(state, set(own)) if convert else dict(state)


def patch_merging_order(channels: int) -> torch.Tensor:
    """(4 * channels,) indices from nn.Unfold's order of a 2x2 patch (channels first, then rows) into timm's.

    timm concatenates the four pixels (columns first), each with all its channels.
    """
    pixel = [0, 2, 1, 3]
    return torch.tensor([c * 4 + pixel[p] for p in range(4) for c in range(channels)])


def _swin(state: State, own: set[str]) -> dict[str, torch.Tensor]:
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
        converted[_common(name)] = value
    return converted


def _vit(state: State, own: set[str]) -> dict[str, torch.Tensor]:
    converted = {}
    for name, value in state.items():
        if name.endswith("relative_position_index"):
            continue
        name = re.sub(r"^layers\.(\d+)\.ln([12])\.", r"blocks.\1.norm\2.", name)
        name = re.sub(r"^layers\.", "blocks.", name)
        # ln1 norms every token, ln2 their mean
        name = re.sub(r"^ln1\.", "norm.", re.sub(r"^ln2\.", "fc_norm.", name))
        name = _common(re.sub(r"^head\.(fc|layers\.head)\.", "head.", name))
        q_bias = name.replace("attn.qkv.bias", "attn.q_bias")
        if name not in own and q_bias in own:
            # a bias of k shifts all scores of a query alike, which softmax does not see: timm has none
            converted[q_bias], _, converted[name.replace("attn.qkv.bias", "attn.v_bias")] = value.chunk(3)
        else:
            converted[name] = value
    return converted


def _resnet(state: State, own: set[str]) -> dict[str, torch.Tensor]:
    # ResNetV1d's deep stem: three convolutions with a norm and a ReLU after each but, in timm, the last
    stem = {"0.conv": "conv1.0", "0.bn": "conv1.1", "1.conv": "conv1.3", "1.bn": "conv1.4", "2.conv": "conv1.6"}
    stem["2.bn"] = "bn1"

    def downsample(m: re.Match[str]) -> str:
        # where a block keeps its stride at 1, mmpretrain has no pooling before the convolution and timm an identity
        shift = f"{m[1]}.0.weight" in state and f"{m[1]}.2.weight" in own
        return f"{m[1]}.{int(m[2]) + shift}."

    converted = {}
    for name, value in state.items():
        name = re.sub(r"^stem\.(\d\.\w+)", lambda m: stem.get(m[1], m[0]), name)
        name = re.sub(r"^(layer\d+\.0\.downsample)\.(\d)\.", downsample, name)
        converted[re.sub(r"^head\.fc\.", "fc.", name)] = value
    return converted


def _common(name: str) -> str:
    name = name.replace("ffn.layers.0.0.", "mlp.fc1.").replace("ffn.layers.1.", "mlp.fc2.")
    return name.replace("patch_embed.projection.", "patch_embed.proj.")
