"""Small models with drawn weights, and files of them as other projects write them, from their published layouts."""

from __future__ import annotations

import re
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
SWIN = {"img_size": 32, "patch_size": 4, "embed_dim": 12, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4}
RESNET = {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8), "stem_width": 8}


def vit(classes=5, **kwargs):
    return timm.create_model("vit_tiny_patch16_224", num_classes=classes, **(VIT | kwargs)).eval()


def small_swin(classes=5, **kwargs):
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=classes, **(SWIN | kwargs)).eval()


def shaken(model):
    """The model with every parameter and statistic drawn at random: ones, zeros and ties hide swapped tensors."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator)
                value.copy_(1 + 0.1 * noise.abs() if name.endswith("running_var") else value + 0.3 * noise)
    return model.eval()


def written(state, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file({k: v.contiguous() for k, v in state.items()}, path)
    else:
        torch.save(state, path)
    return path


@torch.no_grad()
def same_outputs(ours, theirs, size=32) -> None:
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    expected = theirs(images)
    assert expected.std() > 1e-3
    torch.testing.assert_close(ours(images), expected, rtol=1e-5, atol=1e-5)


def microsoft_swin(model) -> dict[str, torch.Tensor]:
    """A timm Swin's state as github.com/microsoft/Swin-Transformer saves it: down-sampling ends a stage, buffers kept."""
    state = {}
    for name, value in model.state_dict().items():
        name = re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name)
        state[name.replace("head.fc.", "head.")] = value.clone()
    for name, module in model.named_modules():
        if hasattr(module, "relative_position_index"):
            state[f"{name}.relative_position_index"] = module.relative_position_index.clone()
    state["layers.0.blocks.1.attn_mask"] = torch.zeros(4, 16, 16)
    return state


def mmpretrain_vit(model) -> dict[str, torch.Tensor]:
    """A timm ViT's state as mmpretrain's VisionTransformer and VisionTransformerClsHead name it."""
    state = {}
    for name, value in model.state_dict().items():
        name = re.sub(r"^blocks\.(\d+)\.norm(\d)", r"layers.\1.ln\2", name).replace("blocks.", "layers.")
        name = name.replace("mlp.fc1", "ffn.layers.0.0").replace("mlp.fc2", "ffn.layers.1")
        name = name.replace("patch_embed.proj.", "patch_embed.projection.").replace("norm.", "ln1.")
        state[name.replace("head.", "head.layers.head.") if name.startswith("head") else f"backbone.{name}"] = value
    return state


def mmpretrain_resnet_v1d(model) -> dict[str, torch.Tensor]:
    """A timm ResNet-d's state as mmpretrain's ResNetV1d and LinearClsHead name it."""
    stem = {"conv1.0": "stem.0.conv", "conv1.1": "stem.0.bn", "conv1.3": "stem.1.conv", "conv1.4": "stem.1.bn"}
    stem |= {"conv1.6": "stem.2.conv", "bn1": "stem.2.bn"}
    state = {}
    for name, value in model.state_dict().items():
        module, _, leaf = name.rpartition(".")
        if module in stem:
            name = f"{stem[module]}.{leaf}"
        # stage 1 keeps its stride at 1: mmpretrain's ResLayer then puts no pooling before the convolution
        name = name.replace("layer1.0.downsample.1.", "layer1.0.downsample.0.")
        name = name.replace("layer1.0.downsample.2.", "layer1.0.downsample.1.")
        state[name.replace("fc.", "head.fc.") if name.startswith("fc.") else f"backbone.{name}"] = value
    return state


def facebook_deit3(model) -> dict[str, torch.Tensor]:
    """A timm DeiT-3's state as github.com/facebookresearch/deit names its layer scale."""
    return {re.sub(r"ls(\d)\.gamma", r"gamma_\1", name): value for name, value in model.state_dict().items()}
