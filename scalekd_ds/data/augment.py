"""Random draws of augmentations, each a pure function of (seed, view, sample). A view is the epoch, unless views repeat."""

from __future__ import annotations

import math

import numpy as np

# keeps these draws apart from others that are made with the same seed
_STREAM = 0x5CA1E


def generator(seed: int, epoch: int, index: int, stream: int = _STREAM) -> np.random.Generator:
    """The random generator from which the augmentations of sample `index` in `epoch` are drawn.

    `stream` keeps draws for different purposes apart.
    """
    key = np.array([(seed ^ (stream << 32)) % 2**64, epoch], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, 0, index], dtype=np.uint64)))


def uniform(seed: int, epochs: np.ndarray, indices: np.ndarray, stream: int) -> np.ndarray:
    """One uniform draw in [0, 1) for each sample of a batch, by the splitmix64 hash of (seed, epoch, sample, stream).

    It serves single draws over a whole batch: a generator object for each sample would cost 10 us, more than the
    decoding of a small image.

    Args:
        seed: The run's seed.
        epochs: (B,) epoch of each sample.
        indices: (B,) index of each sample.
        stream: Number that keeps draws for different purposes apart.

    Returns:
        (B,) float64.
    """
    with np.errstate(over="ignore"):
        x = indices.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        for word in (epochs.astype(np.uint64), np.uint64(seed % 2**64), np.uint64(stream)):
            x = _splitmix64(x + word * np.uint64(0xBF58476D1CE4E5B9) + np.uint64(0x94D049BB133111EB))
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """The finaliser of the splitmix64 generator, applied to each uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def random_resized_crop(
    rng: np.random.Generator, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Draws a crop as torchvision's RandomResizedCrop does: ten tries, then the largest central crop that fits `ratio`.

    Args:
        rng: Random generator.
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        scale: Smallest and largest share of the image's area.
        ratio: Smallest and largest aspect ratio (width / height).

    Returns:
        (y, x, h, w) of the crop in pixels.
    """
    area = height * width
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        target = area * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w
    if width / height < ratio[0]:
        w, h = width, round(width / ratio[0])
    elif width / height > ratio[1]:
        w, h = round(height * ratio[1]), height
    else:
        w, h = width, height
    h, w = min(h, height), min(w, width)
    return (height - h) // 2, (width - w) // 2, h, w
