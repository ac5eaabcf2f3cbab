"""What a batch needs of its device: the drawn operations, grouped by kind and packed into one buffer, on the host."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from scalekd_ds.data.policy import Op

# a plan has NumPy's arrays, and the steps that are applied have tensors on a device
Values = Any

# where a part begins in the buffer: a multiple of every element's size
_ALIGNMENT = 16
_LEVELS = np.arange(256)


class Points(NamedTuple):
    """Operations that give each level of a channel another one. K images, in the order of the counts.

    Attributes:
        images: (K,) int64, places in the batch.
        autocontrast: Number of images with AutoContrast.
        equalize: Number of images with Equalize.
        contrast: (C,) float32, factors of the images with Contrast.
        tables: (K - autocontrast - equalize - C, 256) uint8, the new level for each, where it does not depend on the image.
    """

    images: Values
    autocontrast: int
    equalize: int
    contrast: Values
    tables: Values


class Blends(NamedTuple):
    """Operations between an image and a version of it without colours or details. K images, those with Color first.

    Attributes:
        images: (K,) int64, places in the batch.
        colour: Number of images with Color; the others have Sharpness.
        factors: (K,) float32; 0 is the version, 1 the image.
    """

    images: Values
    colour: int
    factors: Values


class Blurs(NamedTuple):
    """Gaussian blur, as Pillow makes it of three box filters along each axis.

    Attributes:
        images: (K,) int64, places in the batch.
        weights: (K, 5) int64, those of a box filter over neighbours -2 to 2, in units of 2^-24.
    """

    images: Values
    weights: Values


class Warps(NamedTuple):
    """Shears, translations and rotations. K images: those moved along x first, then those moved along y, then rotated ones.

    Attributes:
        images: (K,) int64, places in the batch.
        along_x: Number of images that are moved along x.
        along_y: Number of images that are moved along y.
        matrices: (K, 6) float64, an affine map from the centre of a pixel to where it comes from, row by row.
        bicubic: (K,) int32, 1 for bicubic and 0 for bilinear.
    """

    images: Values
    along_x: int
    along_y: int
    matrices: Values
    bicubic: Values


Step = Points | Blends | Blurs | Warps


class Plan(NamedTuple):
    """The steps of a batch.

    Attributes:
        steps: In their order.
        buffer: (N,) uint8 that holds all arrays, in memory from which a GPU copies it by itself.
    """

    steps: list[Step]
    buffer: torch.Tensor


def plan_batch(
    drawn: Sequence[Sequence[Op]], side: int, pinned: Callable[[torch.Tensor], torch.Tensor] = lambda values: values
) -> Plan | None:
    """The steps that apply the drawn operations to a batch; None where nothing was drawn.

    The first operations of all images come first, then the second ones, and so on.

    Args:
        drawn: The operations of each image.
        side: Height and width of the images in pixels.
        pinned: Moves values to where a GPU copies them from.

    Raises:
        ValueError: An operation is none of those that a policy draws.
    """
    steps = [step for ops in zip_longest(*drawn) for step in _steps_of(ops, side)]
    return _packed(steps, pinned) if steps else None


def unpack(plan: Plan, buffer: torch.Tensor) -> list[Step]:
    """The steps of `plan` with views of `buffer`, which is a copy of the plan's own on any device."""
    first = 0

    def viewed(values: Any) -> Any:
        nonlocal first
        if not isinstance(values, np.ndarray):
            return values
        part = buffer[first : first + values.nbytes].view(torch.from_numpy(values).dtype).view(values.shape)
        first += _aligned(values.nbytes)
        return part

    return [type(step)(*map(viewed, step)) for step in plan.steps]


def _packed(steps: list[Step], pinned: Callable[[torch.Tensor], torch.Tensor]) -> Plan:
    arrays = [values for step in steps for values in step if isinstance(values, np.ndarray)]
    buffer = np.zeros(sum(_aligned(values.nbytes) for values in arrays), dtype=np.uint8)
    first = 0
    for values in arrays:
        buffer[first : first + values.nbytes] = values.reshape(-1).view(np.uint8)
        first += _aligned(values.nbytes)
    return Plan(steps, pinned(torch.from_numpy(buffer)))


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _steps_of(ops: Sequence[Op | None], side: int) -> list[Step]:
    """The steps of one operation for each image, or None for an image without."""
    kinds: dict[str, list[tuple[int, Op]]] = {}
    for place, op in enumerate(ops):
        if op is not None:
            kinds.setdefault(_kind(op.name), []).append((place, op))

    def found(*names: str) -> list[tuple[int, Op]]:
        return [each for name in names for each in kinds.get(name, [])]

    steps: list[Step] = []
    if each := found("AutoContrast", "Equalize", "Contrast", "table"):
        contrasts, tables = found("Contrast"), found("table")
        steps.append(
            Points(
                _places(each),
                len(found("AutoContrast")),
                len(found("Equalize")),
                np.array([op.arguments[0] for _, op in contrasts], dtype=np.float32),
                np.array([_table(op) for _, op in tables], dtype=np.uint8).reshape(-1, 256),
            )
        )
    if each := found("Color", "Sharpness"):
        steps.append(Blends(_places(each), len(found("Color")), np.array([_factor(op) for _, op in each], np.float32)))
    if each := found("GaussianBlur"):
        steps.append(Blurs(_places(each), np.array([_box_weights(op.arguments[0]) for _, op in each])))
    if each := found("x", "y", "Rotate"):
        matrices = np.array([_matrix(op, side) for _, op in each])
        bicubic = np.array([op.resample == Image.Resampling.BICUBIC for _, op in each], dtype=np.int32)
        steps.append(Warps(_places(each), len(found("x")), len(found("y")), matrices, bicubic))
    return steps


def _kind(name: str) -> str:
    """What an operation of timm's name shares with others: the arithmetic, or the axis that it moves along."""
    name = name.removesuffix("Increasing").removesuffix("Original")
    if name in ("AutoContrast", "Equalize", "Contrast", "Color", "Sharpness", "GaussianBlur", "Rotate"):
        return name
    if name in ("Invert", "Posterize", "Solarize", "SolarizeAdd", "Brightness"):
        return "table"
    if name == "Desaturate":
        return "Color"
    for axis in "xy":
        if name.startswith((f"Shear{axis.upper()}", f"Translate{axis.upper()}")):
            return axis
    raise ValueError(f"an operation {name} cannot be applied on a device")


def _places(each: list[tuple[int, Op]]) -> np.ndarray:
    return np.array([place for place, _ in each], dtype=np.int64)


def _factor(op: Op) -> float:
    return min(1.0, max(0.0, 1.0 - op.arguments[0])) if op.name == "Desaturate" else op.arguments[0]


def _table(op: Op) -> np.ndarray:
    """(256,) the level that an operation gives to each, the same for all channels."""
    if op.name == "Invert":
        return 255 - _LEVELS
    argument = op.arguments[0]
    if op.name.startswith("Posterize"):
        # no bit is kept at 0 or below
        return _LEVELS & (0 if argument <= 0 else ~(2 ** max(0, 8 - int(argument)) - 1))
    if op.name == "SolarizeAdd":
        return np.where(_LEVELS < 128, np.minimum(255, _LEVELS + int(argument)), _LEVELS)
    if op.name.startswith("Solarize"):
        return np.where(argument > _LEVELS, _LEVELS, 255 - _LEVELS)
    # brightness is a blend with black, in single precision
    return np.clip(np.float32(argument) * _LEVELS.astype(np.float32), 0.0, 255.0).astype(np.uint8)


def _matrix(op: Op, side: int) -> tuple[float, ...]:
    """The affine map of a geometric operation."""
    argument = op.arguments[0]
    if op.name == "Rotate":
        return _rotation(argument, side)
    if op.name.startswith("Shear"):
        return (1.0, argument, 0.0, 0.0, 1.0, 0.0) if op.name == "ShearX" else (1.0, 0.0, 0.0, argument, 1.0, 0.0)
    pixels = argument * side if op.name.endswith("Rel") else argument
    return (1.0, 0.0, pixels, 0.0, 1.0, 0.0) if op.name[:10] == "TranslateX" else (1.0, 0.0, 0.0, 0.0, 1.0, pixels)


def _rotation(degrees: float, side: int) -> tuple[float, ...]:
    """The matrix of a rotation, with Pillow's rounding of the angle's sine and cosine."""
    angle, centre = -math.radians(degrees % 360.0), side / 2
    cosine, sine = round(math.cos(angle), 15), round(math.sin(angle), 15)
    across, down = round(-math.sin(angle), 15), -centre
    return (
        *(cosine, sine, cosine * down + sine * down + 0.0 + centre),
        *(across, cosine, across * down + cosine * down + 0.0 + centre),
    )


def _box_weights(deviation: float) -> list[int]:
    """Integer weights of one of the three box filters that stand for a Gaussian, in single precision as Pillow has them.

    The length of the box is that of Gwosdek et al., "Theoretical foundations of Gaussian convolution by extended box
    filtering" (2011); its ends count in part.

    Raises:
        ValueError: The box would be wider than five pixels, which no policy asks for.
    """
    single = np.float32
    variance = single(deviation) * single(deviation) / single(3)
    length = single(math.sqrt(12.0 * float(variance) + 1.0))
    whole = single(math.floor((float(length) - 1.0) / 2.0))
    part = (single(2) * whole + single(1)) * (whole * (whole + single(1)) - single(3) * variance)
    part /= single(6) * (variance - (whole + single(1)) * (whole + single(1)))
    radius = int(whole + part)
    if radius > 1:
        raise ValueError(f"a blur of {deviation} pixels is wider than any policy's")
    inner = int(single(2**24) / ((whole + part) * single(2) + single(1)))
    outer = (2**24 - (2 * radius + 1) * inner) // 2
    return [{radius + 1: outer}.get(abs(place), inner if abs(place) <= radius else 0) for place in range(-2, 3)]
