"""Augmentation policies: RandAugment, AutoAugment, TrivialAugmentWide, colour jitter and random erasing.

Policies have timm's names (`rand-m9-n2-mstd0.5-inc1`, `original-mstd0.5`), timm parses them, and timm's functions apply
them to 8-bit images. Only the draws are made here: timm draws from the process's global generators, which threads share
and which a resumed run would have to restore.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image
from timm.data import auto_augment as timm_aa

from scalekd_ds.errors import UserError

_BILINEAR, _BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC
# operations whose argument has a random sign, with their argument at level 10
_SIGNED = {"Rotate": 30.0, "ShearX": 0.3, "ShearY": 0.3, "TranslateXRel": 0.45, "TranslateYRel": 0.45}
# operations whose argument is a factor around 1
_ENHANCE = ("ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing")
# operations whose argument timm derives from the level
_UNSIGNED = (
    "AutoContrast Equalize Invert Posterize PosterizeIncreasing PosterizeOriginal Solarize SolarizeIncreasing "
    "SolarizeAdd Color Contrast Brightness Sharpness Desaturate GaussianBlur"
).split()

# torchvision's TrivialAugmentWide: magnitude at the last of 31 steps, and whether its sign is random
_TRIVIAL_AUGMENT_WIDE = {
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
    """One drawn operation: timm's name, its arguments, and the resampling filter where it is geometric."""

    name: str
    arguments: tuple[float, ...] = ()
    resample: Image.Resampling = _BICUBIC


class Policy:
    """An augmentation policy, which draws the operations for each image. It is false where it never draws any.

    Args:
        name: `rand-...` or an AutoAugment policy (`original`, `originalr`, `v0`, `v0r`) as timm writes them, `trivial`
            for TrivialAugmentWide, or empty for none.
        jitter: Strength of brightness, contrast and saturation jitter; each factor is drawn from 1 - x to 1 + x, and
            the three are applied in random order.
        interpolation: Filter of geometric operations: `bilinear`, `bicubic`, or `random` for a draw of the two, as in
            timm.

    Raises:
        UserError: timm does not know the policy, or it has an operation that is not supported here.
    """

    def __init__(self, name: str, jitter: Sequence[float] = (0.0, 0.0, 0.0), interpolation: str = "random") -> None:
        self.name, self.jitter = name, tuple(jitter)
        self._filters = {"bilinear": (_BILINEAR,), "bicubic": (_BICUBIC,)}.get(interpolation, (_BILINEAR, _BICUBIC))
        self._sub_policies: list[list[timm_aa.AugmentOp]] = []
        if name and name != "trivial":
            sub_policies = _parse_policy(name)
            for op in [op for sub_policy in sub_policies for op in sub_policy]:
                if op.name not in (*_SIGNED, *_ENHANCE, *_UNSIGNED):
                    raise UserError(f"data.auto_augment is {name!r}: its operation {op.name} is not supported.")
            self._sub_policies = sub_policies

    def __bool__(self) -> bool:
        return bool(self.name) or any(self.jitter)

    def draw(self, rng: np.random.Generator) -> list[Op]:
        """The operations for one image, in the order of their application; the list may be empty."""
        ops: Sequence[Op | None] = []
        if self.name == "trivial":
            ops = self._draw_trivial_augment(rng)
        elif self.name.startswith("rand"):
            candidates = self._sub_policies[0]
            ops = [self._draw_op(candidates[i], rng) for i in rng.integers(0, len(candidates), _num_ops(self.name))]
        elif self.name:
            ops = [self._draw_op(op, rng) for op in self._sub_policies[rng.integers(len(self._sub_policies))]]
        return [op for op in ops if op is not None] + self._draw_jitter(rng)

    def _draw_op(self, op: timm_aa.AugmentOp, rng: np.random.Generator) -> Op | None:
        """Draws whether `op` is applied, its level and its sign, as timm does; None where it is not applied."""
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
        return Op(op.name, arguments, self._draw_filter(rng))

    def _draw_trivial_augment(self, rng: np.random.Generator) -> list[Op]:
        name = list(_TRIVIAL_AUGMENT_WIDE)[rng.integers(len(_TRIVIAL_AUGMENT_WIDE))]
        largest, signed = _TRIVIAL_AUGMENT_WIDE[name]
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
        return [Op(name, () if largest == 0.0 else (magnitude,), self._draw_filter(rng))]

    def _draw_jitter(self, rng: np.random.Generator) -> list[Op]:
        if not any(self.jitter):
            return []
        names = ("Brightness", "Contrast", "Color")
        drawn = [
            Op(n, (rng.uniform(max(0.0, 1.0 - x), 1.0 + x),)) for n, x in zip(names, self.jitter, strict=True) if x
        ]
        return [drawn[i] for i in rng.permutation(len(drawn))]

    def _draw_filter(self, rng: np.random.Generator) -> Image.Resampling:
        return self._filters[rng.integers(len(self._filters))]


def _parse_policy(name: str) -> list[list[timm_aa.AugmentOp]]:
    """timm's operations: the sub-policies of AutoAugment, or one list with all candidates of RandAugment."""
    # a fresh dictionary, because timm writes into the one that it is given
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
        f"data.auto_augment is {name!r}: it must be one of timm's, such as rand-m9-n2-mstd0.5-inc1 or "
        "original-mstd0.5, or trivial."
    )


def _num_ops(name: str) -> int:
    """Operations per image of a RandAugment policy, from the part `nN` of its name; 2 is timm's default."""
    sections = [s[1:] for s in name.split("-")[1:] if s[:1] == "n" and s[1:].isdigit()]
    return int(sections[-1]) if sections else 2


def apply_ops(image: np.ndarray, ops: Sequence[Op], fill: tuple[int, int, int]) -> np.ndarray:
    """Applies operations with timm's functions.

    Args:
        image: (H, W, 3) uint8.
        ops: Operations in order.
        fill: Colour of the pixels that geometric operations uncover, 0 to 255.

    Returns:
        (H, W, 3) uint8, a new array.
    """
    picture = Image.fromarray(image)
    for name, arguments, resample in ops:
        if name.startswith("Posterize") and arguments[0] <= 0:
            # no bit is kept, so the image is black; Pillow 13 refuses this argument
            picture = Image.new("RGB", picture.size)
            continue
        picture = timm_aa.NAME_TO_OP[name](picture, *arguments, fillcolor=fill, resample=resample)
    return np.array(picture)


def draw_erasing_box(rng: np.random.Generator, side: int, probability: float) -> tuple[int, int, int, int] | None:
    """Draws the box of random erasing as timm and torchvision do.

    Its area is a share of 0.02 to 1/3 of the image, uniform; its aspect ratio is 0.3 to 1/0.3, log-uniform. There are
    ten tries for a box that fits.

    Args:
        rng: Random generator.
        side: Height and width of the image in pixels.
        probability: Probability of erasing at all.

    Returns:
        (y, x, h, w) of the box in pixels, or None where nothing is erased.
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
