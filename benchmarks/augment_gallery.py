#!/usr/bin/env python3
"""A contact sheet of every augmentation, ours beside timm's: `python benchmarks/augment_gallery.py`.

A column an operation: the image, the operation through the library's own way (drawn as data, applied on 8-bit images), and
timm's transform with the same name; below, whole batches of the recipes.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import harness
import numpy as np
from PIL import Image, ImageDraw
from timm.data import auto_augment as timm_aa

from scalekd_ds.data.policy import Op, Policy, apply

SIDE, GAP, LABEL = 112, 6, 14
FILL = (124, 116, 104)
# at a magnitude that shows; those of timm's increasing set, and what else a policy can draw
OPERATIONS = {
    "AutoContrast": (),
    "Equalize": (),
    "Invert": (),
    "Rotate": (25.0,),
    "PosterizeIncreasing": (2,),
    "SolarizeIncreasing": (110,),
    "SolarizeAdd": (80,),
    "ColorIncreasing": (1.8,),
    "ContrastIncreasing": (1.8,),
    "BrightnessIncreasing": (1.6,),
    "SharpnessIncreasing": (1.9,),
    "ShearX": (0.3,),
    "ShearY": (0.3,),
    "TranslateXRel": (0.3,),
    "TranslateYRel": (0.3,),
}
POLICIES = ("rand-m9-n2-mstd0.5-inc1", "original-mstd0.5", "trivial")


def picture() -> np.ndarray:
    """(SIDE, SIDE, 3) uint8: shapes, a gradient and fine texture, so that each operation shows."""
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    base = np.stack([x, y, 0.5 + 0.3 * np.sin(40 * x) * np.sin(40 * y)], -1)
    image = Image.fromarray((60 + 150 * base).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    draw.ellipse((20, 24, 70, 74), fill=(220, 70, 50))
    draw.rectangle((60, 60, 100, 96), fill=(40, 90, 200))
    draw.line((10, 100, 104, 12), fill=(250, 240, 120), width=5)
    return np.asarray(image)


def timms(image: np.ndarray, name: str, arguments: tuple) -> np.ndarray:
    options = {"fillcolor": FILL, "resample": Image.Resampling.BICUBIC}
    return np.asarray(timm_aa.NAME_TO_OP[name](Image.fromarray(image), *arguments, **options))


def timms_policy(name: str):
    hparams = {"translate_const": int(0.45 * SIDE), "img_mean": FILL}
    build = timm_aa.rand_augment_transform if name.startswith("rand") else timm_aa.auto_augment_transform
    return build(name, hparams)


def sheet(columns: int) -> Image.Image:
    """The whole contact sheet."""
    image, rng = picture(), np.random.default_rng(0)
    random.seed(0), np.random.seed(0)
    rows: list[tuple[str, list[tuple[str, np.ndarray]]]] = []
    names = list(OPERATIONS)
    for first in range(0, len(names), columns):
        part = names[first : first + columns]
        rows.append(("ours", [(n, apply(image, [Op(n, OPERATIONS[n])], FILL)) for n in part]))
        rows.append(("timm", [(n, timms(image, n, OPERATIONS[n])) for n in part]))
    for name in POLICIES:
        policy = Policy(name, interpolation="bicubic")
        rows.append((f"ours {name}", [("", apply(image, policy.draw(rng), FILL)) for _ in range(columns)]))
        if name != "trivial":
            transform = timms_policy(name)
            rows.append((f"timm {name}", [("", np.asarray(transform(Image.fromarray(image)))) for _ in range(columns)]))
    width, height = columns * (SIDE + GAP) + GAP, len(rows) * (SIDE + LABEL + GAP) + GAP
    page = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(page)
    for row, (whose, cells) in enumerate(rows):
        y = GAP + row * (SIDE + LABEL + GAP)
        for column, (name, pixels) in enumerate(cells):
            x = GAP + column * (SIDE + GAP)
            label = f"{whose} {name}" if name else (whose if column == 0 else "")
            draw.text((x, y), label, fill="black")
            page.paste(Image.fromarray(pixels), (x, y + LABEL))
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--columns", type=int, default=5)
    parser.add_argument("--out", help="folder of the PNG; else $OUT, else benchmarks/results")
    args = parser.parse_args()
    path = Path(harness.results_dir(args.out)) / "augmentations.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet(args.columns).save(path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
