#!/usr/bin/env python3
"""Distils without a single label: the feature terms and logit KD. CE is the one term that would need them.

python examples/unlabelled.py --images FOLDER                                   any images, in any subfolders
python examples/unlabelled.py --weights none --size 64 --batch 4 --epochs 2     generated images, no download
"""

import argparse
from pathlib import Path

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch.utils.data import DataLoader, Dataset

from scalekd_ds import ScaleKD, Teacher


class Unlabelled(Dataset):
    """Every image below a folder, as the model wants it."""

    def __init__(self, folder, transform):
        suffixes = (".jpg", ".jpeg", ".png", ".webp")
        self.paths = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in suffixes)
        self.transform = transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return self.transform(Image.open(self.paths[i]).convert("RGB"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", help="a folder; generated noise if not given")
    parser.add_argument("--teacher", default="vit_base_patch16_224.augreg2_in21k_ft_in1k")
    parser.add_argument("--weights", default="pretrained", help="of the teacher: pretrained, none or a file")
    parser.add_argument("--kd-weight", type=float, default=0.5, help="0 leaves the feature terms alone")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args()

    teacher = Teacher(args.teacher, image_size=args.size, weights=args.weights)
    # the student answers in the teacher's classes; with kd_weight 0 its head learns nothing, and num_classes=0 drops it
    student = timm.create_model("resnet18", num_classes=teacher.num_classes)
    distiller = ScaleKD(student, teacher, image_size=args.size, kd_weight=args.kd_weight)
    if args.images:
        config = resolve_data_config({"input_size": (3, args.size, args.size)}, model=student)
        dataset = Unlabelled(args.images, create_transform(**config, is_training=True))
    else:
        dataset = torch.randn(2 * args.batch, 3, args.size, args.size)
    loader = DataLoader(dataset, args.batch, shuffle=True, drop_last=True)

    optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-3)
    for epoch in range(1, args.epochs + 1):
        for images in loader:
            losses = distiller(images)  # no labels: no loss/ce, and the other terms as they are with labels
            optimizer.zero_grad()
            losses["loss/total"].backward()
            optimizer.step()
        terms = "  ".join(f"{name.removeprefix('loss/')} {value.item():.3f}" for name, value in losses.items())
        print(f"epoch {epoch}: {terms}")
    torch.save(distiller.student.state_dict(), "student.pt")


if __name__ == "__main__":
    main()
