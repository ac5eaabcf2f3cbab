"""Teachers and students of every kind that the tests pair, shrunk by their own constructors' arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.efficientnet import EfficientNet
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock
from timm.models.regnet import RegNet, RegNetCfg
from torch import nn

from scalekd_ds import Student, Teacher

CLASSES = 10
VIT = {"embed_dim": 48, "depth": 12, "num_heads": 3}
SHALLOW = {"embed_dim": 48, "depth": 4, "num_heads": 3}
SWIN = {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 3, 6)}

# name -> further arguments; all but SigLIP have a classifier
TEACHERS: dict[str, dict[str, Any]] = {
    "swin_tiny_patch4_window7_224": SWIN | {"img_size": 64, "window_size": 4},
    "swinv2_tiny_window8_256": SWIN | {"img_size": 64, "window_size": 4},
    "convnext_tiny": {"dims": (16, 32, 48, 96), "depths": (1, 1, 1, 2), "input_size": 64},
    "pvt_v2_b1": {"embed_dims": (16, 32, 48, 96), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 3, 6), "input_size": 64},
    "vit_base_patch16_224.augreg_in21k": SHALLOW | {"img_size": 64},
    "deit3_small_patch16_224": SHALLOW | {"img_size": 64},
    "vit_base_patch16_clip_224": SHALLOW | {"img_size": 64},
    "vit_base_patch16_siglip_224": SHALLOW | {"img_size": 64, "num_classes": 0},
    "vit_small_patch14_dinov2": SHALLOW | {"img_size": 70},
    "vit_small_patch14_reg4_dinov2": SHALLOW | {"img_size": 70},
    "vit_small_patch16_dinov3": SHALLOW | {"img_size": 64},
    "beitv2_base_patch16_224": SHALLOW | {"img_size": 64},
    "eva_large_patch14_196": SHALLOW | {"img_size": 70},
    "eva02_tiny_patch14_336": SHALLOW | {"img_size": 70},
}


def _mobile(*stages: str, **kwargs: Any) -> EfficientNet:
    return EfficientNet(decode_arch_def([[stage] for stage in stages]), stem_size=8, **kwargs)


# name -> further arguments, or the constructor itself where the name's own function fixes the widths
STUDENTS: dict[str, dict[str, Any] | Callable[..., nn.Module]] = {
    "resnet18": {"layers": (1, 1, 1, 1), "channels": (16, 16, 32, 64)},
    "mobilenetv1": partial(
        _mobile, "dsa_r1_k3_s1_c8", "dsa_r2_k3_s2_c16", "dsa_r2_k3_s2_c24", "dsa_r2_k3_s2_c48", "dsa_r2_k3_s2_c64"
    ),
    "mobilenetv3_small_050": {},
    "mobilenetv4_conv_small_035": {},
    "efficientnet": partial(
        _mobile,
        "ds_r1_k3_s1_c8_se0.25",
        "ir_r1_k3_s2_e6_c16_se0.25",
        "ir_r1_k5_s2_e6_c24",
        "ir_r2_k3_s2_e6_c32",
        "ir_r1_k5_s2_e6_c48",
    ),
    "regnet": partial(RegNet, RegNetCfg(depth=8, w0=16, wa=8.0, wm=1.8, group_size=8, se_ratio=0.25)),
    "convnext_tiny": {"dims": (16, 32, 48, 64), "depths": (1, 1, 1, 1)},
    "mixer": partial(MlpMixer, img_size=64, num_blocks=4, embed_dim=48),
    "resmlp": partial(
        MlpMixer, img_size=64, num_blocks=4, embed_dim=48, mlp_ratio=4, block_layer=ResBlock, norm_layer=Affine
    ),
    "vit_small_patch16_224": SHALLOW,
    "deit_small_distilled_patch16_224": SHALLOW,
    "swin_tiny_patch4_window7_224": SWIN | {"window_size": 2},
    "efficientformerv2_s0": {"embed_dims": (16, 16, 32, 48), "depths": (1, 1, 2, 2)},
    "fastvit_t8": {"embed_dims": (16, 32, 64, 128), "layers": (1, 1, 1, 1)},
}


def make_teacher(name: str, **kwargs: Any) -> Teacher:
    """A teacher of `TEACHERS` with random weights, the same ones each time."""
    torch.manual_seed(0)
    return Teacher(name, weights="none", **({"num_classes": CLASSES} | TEACHERS[name] | kwargs))


def make_student(name: str, image_size: int = 64) -> Student:
    """A student of `STUDENTS` with random weights, the same ones each time."""
    torch.manual_seed(1)
    arguments = STUDENTS[name]
    if not isinstance(arguments, dict):
        return Student(arguments(num_classes=CLASSES))
    return Student(name, CLASSES, image_size, **arguments)
