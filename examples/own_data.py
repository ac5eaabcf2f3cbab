#!/usr/bin/env python3
"""A data set of your own format and classes: normalisation, mixup's soft targets, and a CSV for launch/train.py.

python examples/own_data.py                                                     DINOv2's features, 224 pixels
python examples/own_data.py --weights none --size 56 --batch 8 --epochs 2       no download; seconds on a CPU
python examples/own_data.py --csv mine                                          the same images for launch/train.py
"""

import argparse
import csv
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import Mixup
from torch.utils.data import DataLoader, Dataset

from scalekd_ds import ScaleKD, Teacher
from scalekd_ds.models.preprocessing import normalisation_of

CLASSES = ("stripes", "checks", "blobs")


class Patterns(Dataset):
    """Generated images in the place of your format: a data set only has to return (image, label)."""

    def __init__(self, count, side, mean, std, seed=0):
        rng = np.random.default_rng(seed)
        self.labels = np.arange(count) % len(CLASSES)
        # one image (side, side, 3) of bytes for each label
        self.pixels = [self._draw(CLASSES[label], side, rng) for label in self.labels]
        self.mean, self.std = (torch.tensor(v).view(3, 1, 1) for v in (mean, std))

    @staticmethod
    def _draw(kind, side, rng):
        y, x = np.mgrid[:side, :side] / side * rng.uniform(12, 24)
        phase_x, phase_y = rng.uniform(0, 6, 2)
        wave = {
            "stripes": np.sin(x + phase_x),
            "checks": np.sin(x + phase_x) * np.sin(y + phase_y),
            "blobs": np.cos(x / 4 + phase_x) + np.cos(y / 4),
        }
        grey = np.clip(128 + 90 * wave[kind] + rng.normal(0, 12, (side, side)), 0, 255)
        return (grey[..., None] * rng.uniform(0.6, 1.0, 3)).astype(np.uint8)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        # in the STUDENT's normalisation: ScaleKD itself converts them to the teacher's mean, std and size
        pixels = torch.from_numpy(self.pixels[i]).permute(2, 0, 1) / 255
        return (pixels - self.mean) / self.std, int(self.labels[i])


def write_csv(dataset, folder, name):
    """Writes the images and `name`.csv with the columns path and label, as --data.train and --data.val take it."""
    folder = Path(folder)
    (folder / name).mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("path", "label"))
        for i, (pixels, label) in enumerate(zip(dataset.pixels, dataset.labels, strict=True)):
            Image.fromarray(pixels).save(folder / name / f"{i:05d}.png")
            table.writerow((f"{name}/{i:05d}.png", CLASSES[label]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="vit_small_patch14_dinov2", help="timm name or consolidated .safetensors")
    parser.add_argument("--weights", default="pretrained", help="of a teacher by name: pretrained, none or a file")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--batch", type=int, default=32, help="must be even for mixup")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--csv", metavar="FOLDER", help="only write the images and two tables there")
    args = parser.parse_args()

    student = timm.create_model("resnet18", num_classes=len(CLASSES))
    mean, std = normalisation_of(student)
    train = Patterns(args.images, args.size, mean, std)
    val = Patterns(args.images // 3, args.size, mean, std, seed=1)
    if args.csv:
        write_csv(train, args.csv, "train")
        write_csv(val, args.csv, "val")
        print(f"python launch/train.py --data.root {args.csv} --data.train train.csv --data.val val.csv "
              f"--student resnet18 --teacher {args.teacher} --distill.kd_weight 0 --run.dir runs/own")  # fmt: skip
        return

    # A teacher by name does not know these classes: without its classifier, ScaleKD distils its features and leaves
    # out logit KD. A teacher that was fine-tuned on them (launch/train.py --teacher none --student NAME) keeps it.
    without_classifier = {} if args.teacher.endswith(".safetensors") else {"num_classes": 0}
    teacher = Teacher(args.teacher, image_size=args.size, weights=args.weights, **without_classifier)
    distiller = ScaleKD(student, teacher, image_size=args.size)
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-3)
    mixup = Mixup(mixup_alpha=0.2, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=len(CLASSES))
    for epoch in range(1, args.epochs + 1):
        distiller.train()
        for images, labels in DataLoader(train, args.batch, shuffle=True, drop_last=True):
            images, targets = mixup(images, labels)  # soft targets (B, K), which ScaleKD takes as they are
            losses = distiller(images, targets)
            optimizer.zero_grad()
            losses["loss/total"].backward()
            optimizer.step()
        distiller.eval()
        with torch.no_grad():
            correct = sum((distiller.student(x).argmax(1) == y).sum().item() for x, y in DataLoader(val, args.batch))
        print(f"epoch {epoch}: loss {losses['loss/total'].item():.3f}, {correct} of {len(val)} right")


if __name__ == "__main__":
    main()
