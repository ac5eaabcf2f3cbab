"""Small image folders that tests make themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from scalekd_ds.data import fashion


def picture(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """A smooth random picture: noise alone would make every resize filter look wrong."""
    small = rng.integers(0, 255, (max(2, height // 16), max(2, width // 16), 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def make_folder(root: Path, per_class: dict[str, int], size=(40, 48), seed: int = 0, suffix: str = "jpg") -> Path:
    """An ImageFolder of `per_class` images with sizes around `size` (height, width)."""
    rng = np.random.default_rng(seed)
    for name, count in per_class.items():
        folder = root / name
        folder.mkdir(parents=True)
        for i in range(count):
            height, width = (int(s + rng.integers(0, s // 4 + 1)) for s in size)
            options = {"quality": 95} if suffix == "jpg" else {}
            picture(rng, height, width).save(folder / f"{i:03d}.{suffix}", **options)
    return root


def make_dataset(root: Path, train: int = 24, val: int = 10, classes: int = 3, size=(40, 48)) -> Path:
    """`root`/train and `root`/val of `classes` classes; a class has its own brightness, so that it can be learned."""
    rng = np.random.default_rng(1)
    for name, count in (("train", train), ("val", val)):
        for i in range(count):
            label = i % classes
            folder = root / name / f"class_{label}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.asarray(picture(rng, *size), dtype=np.float32) * 0.3 + 255 * 0.7 * label / max(1, classes - 1)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:03d}.jpg", quality=95)
    return root


def make_fashion(root: Path, train: int, val: int) -> Path:
    """Noise in the place of Fashion-MNIST's images, as `scalekd prepare-data fashion-mnist` writes them."""
    rng = np.random.default_rng(0)
    sets = {
        name: (rng.integers(0, 255, (count, 28, 28), dtype=np.uint8), np.arange(count, dtype=np.uint8) % 10)
        for name, count in (("train", train), ("val", val))
    }
    fashion.write(root, sets, fashion.CLASSES, "noise")
    return root
