#!/usr/bin/env python3
"""Draws a contact sheet of every augmentation, ours beside timm's: `python benchmarks/augment_gallery.py`.

Each operation has a column, with the library's own operation above timm's of the same name. The rows below show whole policies
of the recipes, drawn several times.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import harness
import numpy as np
from PIL import Image, ImageDraw
from timm.data import auto_augment as timm_aa

from scalekd_ds.data.policy import Op, Policy, apply_ops

SIDE, GAP, LABEL = 112, 6, 14
FILL = (124, 116, 104)
# name in timm -> arguments, with a magnitude that can be seen
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


def apply_timm(image: np.ndarray, name: str, arguments: tuple) -> np.ndarray:
    """timm's operation of that name on an image (H, W, 3) of uint8."""
    options = {"fillcolor": FILL, "resample": Image.Resampling.BICUBIC}
    return np.asarray(timm_aa.NAME_TO_OP[name](Image.fromarray(image), *arguments, **options))


def timm_policy(name: str):
    """timm's transform for a policy."""
    hparams = {"translate_const": int(0.45 * SIDE), "img_mean": FILL}
    build = timm_aa.rand_augment_transform if name.startswith("rand") else timm_aa.auto_augment_transform
    return build(name, hparams)


def sheet(columns: int) -> Image.Image:
    """Draws the contact sheet.

    Args:
        columns: Pictures in a row.
    """
    image, rng = picture(), np.random.default_rng(0)
    random.seed(0), np.random.seed(0)
    rows: list[tuple[str, list[tuple[str, np.ndarray]]]] = []
    names = list(OPERATIONS)
    for first in range(0, len(names), columns):
        part = names[first : first + columns]
        rows.append(("ours", [(n, apply_ops(image, [Op(n, OPERATIONS[n])], FILL)) for n in part]))
        rows.append(("timm", [(n, apply_timm(image, n, OPERATIONS[n])) for n in part]))
    for name in POLICIES:
        policy = Policy(name, interpolation="bicubic")
        rows.append((f"ours {name}", [("", apply_ops(image, policy.draw(rng), FILL)) for _ in range(columns)]))
        if name != "trivial":
            transform = timm_policy(name)
            rows.append((f"timm {name}", [("", np.asarray(transform(Image.fromarray(image)))) for _ in range(columns)]))
    width, height = columns * (SIDE + GAP) + GAP, len(rows) * (SIDE + LABEL + GAP) + GAP
    page = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(page)
    for row, (title, cells) in enumerate(rows):
        y = GAP + row * (SIDE + LABEL + GAP)
        for column, (name, pixels) in enumerate(cells):
            x = GAP + column * (SIDE + GAP)
            label = f"{title} {name}" if name else (title if column == 0 else "")
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
