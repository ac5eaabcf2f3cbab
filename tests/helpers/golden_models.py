"""The models of the recorded flows, as timm builds them, and what the official code calls the loss terms."""

from __future__ import annotations

from timm.models.eva import Eva
from timm.models.resnet import BasicBlock, ResNet
from timm.models.swin_transformer import SwinTransformer
from torch import nn

TERMS = {
    "loss/ce": "ori_loss",
    "loss/kd": "loss_kd",
    "loss/spatial_s3": "loss_s3",
    "loss/frequency_s3": "loss_s3_alt",
    "loss/spatial_s4": "loss_s4",
    "loss/frequency_s4": "loss_s4_alt",
    "loss/total": "total",
}
# analytically zero: they hold rounding noise in both implementations
ZERO = ("conv.bias", "k.bias", "s4.frequency.fc2.bias")


def resnet18_base8() -> ResNet:
    """timm's ResNet-18 with a stem of 8 channels, which its constructor does not offer."""
    model = ResNet(BasicBlock, (2, 2, 2, 2), num_classes=10, channels=(8, 16, 32, 64))
    model.conv1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False)
    model.bn1 = nn.BatchNorm2d(8)
    model.layer1 = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8))
    return model


def swin() -> SwinTransformer:
    return SwinTransformer(num_classes=10, embed_dim=8, depths=(1, 1, 2, 2), num_heads=(1, 2, 4, 4), drop_path_rate=0.0)


def eva() -> Eva:
    return Eva(
        img_size=224,
        patch_size=14,
        num_classes=10,
        embed_dim=16,
        depth=24,
        num_heads=2,
        mlp_ratio=2,
        init_values=None,
        use_abs_pos_emb=True,
        use_rot_pos_emb=False,
    )
