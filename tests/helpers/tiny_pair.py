"""A student and a teacher that step in milliseconds, with the same random weights each time, and a batch for them."""

from __future__ import annotations

import timm
import torch
from torch import nn

# constructor arguments of swin_tiny_patch4_window7_224 and of a ResNet, for images of 64 pixels
SWIN = {"img_size": 64, "patch_size": 4, "window_size": 4, "embed_dim": 24, "depths": (1, 2), "num_heads": (2, 4)}
RESNET = {"layers": (1, 1, 1, 1), "channels": (8, 16, 32, 64), "stem_type": "deep", "stem_width": 8}


def teacher(num_classes: int = 10, **kwargs) -> nn.Module:
    """A two-stage Swin; `kwargs` are further ones of its constructor."""
    torch.manual_seed(1)
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=num_classes, **(SWIN | kwargs))


def student(num_classes: int = 10) -> nn.Module:
    """A ResNet of one block a stage."""
    torch.manual_seed(2)
    return timm.create_model("resnet18", num_classes=num_classes, **RESNET)


def batch(size: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Two images and their labels."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, 3, size, size, generator=generator), torch.tensor([1, 7])
