#!/usr/bin/env python3
"""A teacher of a class that this package does not know: it takes three functions and `register_family`.

python examples/own_teacher.py --weights mine.safetensors
python examples/own_teacher.py --size 64 --dim 96 --steps 2                     random weights; seconds on a CPU
"""

import argparse

import timm
import torch
from safetensors.torch import load_file
from torch import nn

from scalekd_ds import ScaleKD, Teacher
from scalekd_ds.teacher import Family, Stage, register_family


class MyViT(nn.Module):
    """Your model, as it is. ScaleKD itself uses only its `num_classes`, `pretrained_cfg` and `forward_head`."""

    def __init__(self, size=224, patch=16, dim=384, depth=12, heads=6, num_classes=1000):
        super().__init__()
        self.num_classes = num_classes
        # what it was trained on: ScaleKD converts the student's images to this mean, std and size
        self.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "input_size": (3, size, size)}
        self.grid, self.dim, self.heads = (size // patch, size // patch), dim, heads
        self.patches = nn.Conv2d(3, dim, patch, patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, self.grid[0] * self.grid[1], dim))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(dim, heads, 4 * dim, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, num_classes)

    def embed(self, images):
        return self.patches(images).flatten(2).transpose(1, 2) + self.positions

    def forward_head(self, tokens):
        return self.head(self.norm(tokens).mean(1))

    def forward(self, images):
        tokens = self.embed(images)
        for block in self.blocks:
            tokens = block(tokens)
        return self.forward_head(tokens)


# You choose what "the last stage" is: here the last two of twelve blocks. All tokens are (B, P, C), row by row on the
# grid, without a class token.
LAST_BLOCKS = 2


def forward(model, images):
    """Images in the teacher's own normalisation -> (target tokens, features that forward_head takes)."""
    tokens = model.embed(images)
    for block in model.blocks:
        tokens = block(tokens)
    return tokens, tokens


def last_stage(model, tokens):
    """Tokens before the last stage -> tokens after it, differentiable: the student's pass through here (TPP)."""
    for block in model.blocks[-LAST_BLOCKS:]:
        tokens = block(tokens)
    return tokens


def stages(model):
    """Grid, channels and heads before the last stage and after it."""
    stage = Stage(model.grid, model.dim, model.heads)
    return stage, stage


register_family(MyViT, Family(forward, last_stage, stages))


def check(teacher, images):
    """Checks that `last_stage` of the teacher's own tokens is its target; do this once for a family of your own."""
    tokens = teacher.model.embed(images)
    for block in teacher.model.blocks[:-LAST_BLOCKS]:
        tokens = block(tokens)
    torch.testing.assert_close(teacher.last_stage(tokens), teacher.targets(images).tokens, rtol=1e-4, atol=1e-4)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", help="a .safetensors of a MyViT; random weights if not given")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()

    model = MyViT(args.size, dim=args.dim)
    if args.weights:
        model.load_state_dict(load_file(args.weights))
    teacher = Teacher(model)
    check(teacher, torch.randn(2, 3, args.size, args.size))
    distiller = ScaleKD(timm.create_model("resnet18", num_classes=1000), teacher, image_size=args.size)
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-3)
    images, labels = torch.randn(4, 3, args.size, args.size), torch.randint(1000, (4,))
    for step in range(1, args.steps + 1):
        losses = distiller(images, labels)
        optimizer.zero_grad()
        losses["loss/total"].backward()
        optimizer.step()
        print(f"step {step}: loss {losses['loss/total'].item():.3f}")


if __name__ == "__main__":
    main()
