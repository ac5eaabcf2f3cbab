"""Shears, translations and rotations: Pillow's bilinear and bicubic resampling of an affine map.

Positions and sums are in double precision and added in Pillow's order. A sum of 8-bit values often lies at a whole number,
such as along a ramp of colours that is moved by a simple fraction, and Pillow cuts fractions off.

Shapes: K images, S x S pixels, 4 taps of a cubic along an axis, 3 channels.
"""

from __future__ import annotations

import torch

from scalekd_ds.data.on_device.plan import Warps


def warp(images: torch.Tensor, step: Warps, fill: torch.Tensor) -> None:
    """Applies a step to images (B, S, S, 3) uint8, in place; `fill` is (3,) uint8."""
    moved = step.along_x + step.along_y
    if moved:
        _shift(images, step.images[:moved], step.along_x, step.matrices[:moved], step.bicubic[:moved], fill)
    if moved < len(step.images):
        _turn(images, step.images[moved:], step.matrices[moved:], step.bicubic[moved:], fill)


def _shift(
    images: torch.Tensor,
    places: torch.Tensor,
    along_x: int,
    matrices: torch.Tensor,
    bicubic: torch.Tensor,
    fill: torch.Tensor,
) -> None:
    """Moves images along x, the first `along_x`, or along y.

    Only one axis is interpolated, since along the other one every position is the centre of a pixel. Images that are moved
    along y are worked on with their axes exchanged.
    """
    side = images.shape[1]
    centres = torch.arange(0.5, side, device=images.device, dtype=torch.float64)
    is_x = torch.arange(len(places), device=images.device) < along_x
    slope, offset = torch.where(is_x[:, None], matrices[:, 1:3], matrices[:, 3::2])[:, :, None, None].unbind(1)
    along = (slope * centres[:, None] + centres).add_(offset)
    inside = _inside(along, side)
    fraction, taps = _taps(along, side)
    lines = torch.arange(side, device=images.device)
    # of pixels in the batch: those of a line follow each other along x, and are a row apart along y
    stride = torch.where(is_x, 1, side)[:, None, None, None]
    line = lines * torch.where(is_x, side, 1)[:, None] + places[:, None] * side**2
    found = images.view(-1, 3)[taps.mul_(stride).add_(line[:, :, None, None])].short()
    moved = _filled(_interpolated(found, fraction[..., None], bicubic.bool()[:, None, None, None]), inside, fill)
    if along_x:
        images.index_copy_(0, places[:along_x], moved[:along_x])
    if along_x < len(moved):
        images.index_copy_(0, places[along_x:], moved[along_x:].transpose(1, 2))


def _turn(
    images: torch.Tensor, places: torch.Tensor, matrices: torch.Tensor, bicubic: torch.Tensor, fill: torch.Tensor
) -> None:
    """Resamples images at the positions of any affine map."""
    side = images.shape[1]
    centres = torch.arange(0.5, side, device=images.device, dtype=torch.float64)
    matrix = matrices[:, None, None, :]
    x, y = ((matrix[..., i] * centres + matrix[..., i + 1] * centres[:, None]).add_(matrix[..., i + 2]) for i in (0, 3))
    inside = _inside(x, side).logical_and_(_inside(y, side))
    (x_fraction, columns), (y_fraction, rows) = _taps(x, side), _taps(y, side)
    first = (places * side**2)[:, None, None, None]
    pixels = rows.mul_(side).add_(first)[..., None] + columns[..., None, :]
    # (K, S, S, 4 rows, 4 columns, 3)
    found = images.view(-1, 3)[pixels].short()
    is_bicubic = bicubic.bool()[:, None, None, None]
    along_x = _interpolated(found, x_fraction[..., None, None], is_bicubic[..., None])
    turned = _interpolated(along_x, y_fraction[..., None], is_bicubic)
    images.index_copy_(0, places, _filled(turned, inside, fill))


def _inside(positions: torch.Tensor, side: int) -> torch.Tensor:
    return (positions >= 0.0).logical_and_(positions < side)


def _taps(positions: torch.Tensor, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """How far positions (K, S, S) lie behind a pixel's centre, and that pixel with the one before and two behind it.

    Returns:
        (K, S, S) float64 from 0 to 1, and (K, S, S, 4) int64; beyond the edge is the pixel of the edge.
    """
    positions = positions.sub_(0.5)
    cell = positions.floor()
    around = torch.arange(-1, 3, device=positions.device)
    return positions.sub_(cell), (cell.long()[..., None] + around).clamp_(0, side - 1)


def _interpolated(taps: torch.Tensor, fraction: torch.Tensor, bicubic: torch.Tensor) -> torch.Tensor:
    """The cubic with a = -0.5 in Pillow's form, or the line between the middle two, of (..., 4, 3) taps: (..., 3) float64.

    Pillow's form is v2 + d (p2 + d (p3 + d p4)); a line has the slope v3 - v2 as p2, and the others are 0.
    """
    v1, v2, v3, v4 = taps.unbind(-2)
    p4 = (v2 - v1).sub_(v3).add_(v4).mul_(bicubic)
    p3 = (v1 - v2).mul_(2).add_(v3).sub_(v4).mul_(bicubic)
    p2 = v3 - torch.where(bicubic, v1, v2)
    return (p4 * fraction).add_(p3).mul_(fraction).add_(p2).mul_(fraction).add_(v2)


def _filled(values: torch.Tensor, inside: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
    """Values (K, S, S, 3) cut down to uint8, and `fill` where nothing was found."""
    return torch.where(inside[..., None], values.clamp_(0.0, 255.0).byte(), fill)
