#!/usr/bin/env python3
"""Distils without labels, by the feature terms and logit KD: of ScaleKD's terms, CE alone needs labels.

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
    """Every image below a folder, transformed for the student."""

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
    parser.add_argument("--weights", default="pretrained", help="weights of the teacher: pretrained, none or a file")
    parser.add_argument("--kd-weight", type=float, default=0.5, help="0 distils by the feature terms only")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args()

    teacher = Teacher(args.teacher, image_size=args.size, weights=args.weights)
    # logit KD needs the teacher's classes; with --kd-weight 0 nothing trains the head, and num_classes=0 would drop it
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
            losses = distiller(images)  # without labels there is no loss/ce; the other terms are unchanged
            optimizer.zero_grad()
            losses["loss/total"].backward()
            optimizer.step()
        terms = "  ".join(f"{name.removeprefix('loss/')} {value.item():.3f}" for name, value in losses.items())
        print(f"epoch {epoch}: {terms}")
    torch.save(distiller.student.state_dict(), "student.pt")


if __name__ == "__main__":
    main()
