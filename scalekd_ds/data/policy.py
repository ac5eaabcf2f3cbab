"""Augmentation policies: what is drawn for an image, as data, and how it is applied.

Policies are named as timm names them (`rand-m9-n2-mstd0.5-inc1`, `original-mstd0.5`), are read by timm, and are applied by
timm's own functions on 8-bit images. Only the drawing is ours: timm draws from generators of the process, which threads
share and a resumed run would have to restore.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image
from timm.data import auto_augment as timm_aa

from scalekd_ds.errors import UserError

_BILINEAR, _BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC
# full scale at level 10, its sign drawn
_SIGNED = {"Rotate": 30.0, "ShearX": 0.3, "ShearY": 0.3, "TranslateXRel": 0.45, "TranslateYRel": 0.45}
_ENHANCE = ("ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing")
_PLAIN = (
    "AutoContrast Equalize Invert Posterize PosterizeIncreasing PosterizeOriginal Solarize SolarizeIncreasing SolarizeAdd "
    "Color Contrast Brightness Sharpness Desaturate GaussianBlur"
).split()

# torchvision's TrivialAugmentWide: largest magnitude of 31 steps, and whether its sign is drawn
_WIDE = {
    "Identity": (0.0, False),
    "ShearX": (0.99, True),
    "ShearY": (0.99, True),
    "TranslateX": (32.0, True),
    "TranslateY": (32.0, True),
    "Rotate": (135.0, True),
    "Brightness": (0.99, True),
    "Color": (0.99, True),
    "Contrast": (0.99, True),
    "Sharpness": (0.99, True),
    "Posterize": (6.0, False),
    "Solarize": (255.0, False),
    "AutoContrast": (0.0, False),
    "Equalize": (0.0, False),
}


class Op(NamedTuple):
    """One drawn operation: timm's name, its arguments, and the filter of a geometric one."""

    name: str
    arguments: tuple[float, ...] = ()
    resample: Image.Resampling = _BICUBIC


class Policy:
    """Draws operations for an image.

    Args:
        name: `rand-...` or an AutoAugment policy (`original`, `originalr`, `v0`, `v0r`) as timm writes them, `trivial` for
            TrivialAugmentWide, or empty.
        jitter: Brightness, contrast and saturation: factors are drawn within 1 +- each, in random order.
        interpolation: Filter of geometric operations: `bilinear`, `bicubic`, or `random` of the two, as timm has it.

    Raises:
        UserError: A policy that timm does not know, or one whose operations draw from the process's generators.
    """

    def __init__(self, name: str, jitter: Sequence[float] = (0.0, 0.0, 0.0), interpolation: str = "random") -> None:
        self.name, self.jitter = name, tuple(jitter)
        self._filters = {"bilinear": (_BILINEAR,), "bicubic": (_BICUBIC,)}.get(interpolation, (_BILINEAR, _BICUBIC))
        self._timm = None
        if name and name != "trivial":
            known = _known(name)
            for op in [o for part in known for o in part]:
                if op.name not in (*_SIGNED, *_ENHANCE, *_PLAIN):
                    raise UserError(f"data.auto_augment is {name!r}: its operation {op.name} is not supported.")
            self._timm = known

    def __bool__(self) -> bool:
        return bool(self.name) or any(self.jitter)

    def draw(self, rng: np.random.Generator) -> list[Op]:
        """The operations of one image, in order; often none."""
        ops = []
        if self.name == "trivial":
            ops = self._draw_wide(rng)
        elif self.name.startswith("rand"):
            layers = _layers(self.name)
            ops = [self._draw(self._timm[0][i], rng) for i in rng.integers(0, len(self._timm[0]), layers)]
        elif self.name:
            ops = [self._draw(op, rng) for op in self._timm[rng.integers(len(self._timm))]]
        return [op for op in ops if op is not None] + self._draw_jitter(rng)

    def _draw(self, op: timm_aa.AugmentOp, rng: np.random.Generator) -> Op | None:
        if rng.random() > op.prob:
            return None
        level, noise = op.magnitude, op.magnitude_std
        if noise == float("inf"):
            level = rng.uniform(0.0, level)
        elif noise > 0:
            level = rng.normal(level, noise)
        level = max(0.0, min(level, op.magnitude_max or 10.0))
        sign = -1.0 if rng.random() > 0.5 else 1.0
        if op.name in _SIGNED:
            arguments = (sign * level / 10.0 * _SIGNED[op.name],)
        elif op.name in _ENHANCE:
            arguments = (max(0.1, 1.0 + sign * level / 10.0 * 0.9),)
        else:
            level_to_argument = timm_aa.LEVEL_TO_ARG[op.name]
            arguments = tuple(level_to_argument(level, op.hparams)) if level_to_argument else ()
        return Op(op.name, arguments, self._filter(rng))

    def _draw_wide(self, rng: np.random.Generator) -> list[Op]:
        name = list(_WIDE)[rng.integers(len(_WIDE))]
        largest, signed = _WIDE[name]
        step = int(rng.integers(31))
        magnitude = largest * step / 30 * (-1.0 if signed and rng.random() > 0.5 else 1.0)
        if name == "Identity":
            return []
        if name in ("Brightness", "Color", "Contrast", "Sharpness"):
            magnitude += 1.0
        if name == "Posterize":
            magnitude = 8 - round(step / 5)
        if name == "Solarize":
            magnitude = 255.0 - magnitude
        return [Op(name, () if largest == 0.0 else (magnitude,), self._filter(rng))]

    def _draw_jitter(self, rng: np.random.Generator) -> list[Op]:
        if not any(self.jitter):
            return []
        names = ("Brightness", "Contrast", "Color")
        drawn = [
            Op(n, (rng.uniform(max(0.0, 1.0 - x), 1.0 + x),)) for n, x in zip(names, self.jitter, strict=True) if x
        ]
        return [drawn[i] for i in rng.permutation(len(drawn))]

    def _filter(self, rng: np.random.Generator) -> Image.Resampling:
        return self._filters[rng.integers(len(self._filters))]


def _known(name: str) -> list[list[timm_aa.AugmentOp]]:
    """timm's operations: one list of candidates for RandAugment, the sub-policies for AutoAugment."""
    # a dictionary of its own: timm writes what it parses into the one that it is given
    hparams = {"translate_const": 250, "img_mean": (128, 128, 128)}
    try:
        if name.startswith("rand"):
            found = timm_aa.rand_augment_transform(name, hparams)
            if found.choice_weights is None:
                return [found.ops]
        else:
            return timm_aa.auto_augment_transform(name, hparams).policy
    except (AssertionError, ValueError):
        pass
    raise UserError(
        f"data.auto_augment is {name!r}: it must be one of timm's, such as rand-m9-n2-mstd0.5-inc1 or original-mstd0.5, or "
        "trivial."
    )


def _layers(name: str) -> int:
    sections = [s[1:] for s in name.split("-")[1:] if s[:1] == "n" and s[1:].isdigit()]
    return int(sections[-1]) if sections else 2


def apply(image: np.ndarray, ops: Sequence[Op], fill: tuple[int, int, int]) -> np.ndarray:
    """(H, W, 3) uint8 after the operations, by timm's functions; what they uncover is `fill`."""
    picture = Image.fromarray(image)
    for name, arguments, resample in ops:
        if name.startswith("Posterize") and arguments[0] <= 0:
            # no bit is kept; Pillow 13 refuses to be asked
            picture = Image.new("RGB", picture.size)
            continue
        picture = timm_aa.NAME_TO_OP[name](picture, *arguments, fillcolor=fill, resample=resample)
    return np.array(picture)


def erasing(rng: np.random.Generator, side: int, probability: float) -> tuple[int, int, int, int] | None:
    """(y, x, h, w) in pixels that random erasing covers, as timm and torchvision draw it; None: nothing.

    A share of 0.02 to 1/3 of the area, aspect ratio 0.3 to 1/0.3, log-uniform; ten tries.
    """
    if rng.random() >= probability:
        return None
    for _ in range(10):
        area = rng.uniform(0.02, 1 / 3) * side * side
        aspect = np.exp(rng.uniform(np.log(0.3), np.log(1 / 0.3)))
        h, w = round(float(np.sqrt(area * aspect))), round(float(np.sqrt(area / aspect)))
        if h < side and w < side:
            return int(rng.integers(0, side - h + 1)), int(rng.integers(0, side - w + 1)), h, w
    return None
