"""Turns numbers into colours, and scales, blends, marks and tiles pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

# dark blue, violet, red, orange, pale yellow: lightness rises all the way, so the order is also clear in grey
_HEAT = ((0.02, 0.01, 0.10), (0.34, 0.06, 0.43), (0.73, 0.21, 0.33), (0.97, 0.55, 0.15), (0.99, 0.97, 0.75))


def unnormalise(images_BCHW: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Normalised images (B, 3, H, W) -> images in 0 to 1, on the CPU in float32."""
    images = images_BCHW.detach().float().cpu()
    mean_C11, std_C11 = (torch.tensor(tuple(v))[:, None, None] for v in (mean, std))
    return (images * std_C11 + mean_C11).clamp(0.0, 1.0)


def heat_colours(values: torch.Tensor) -> torch.Tensor:
    """Values (..., h, w) in 0 to 1 -> colours (..., 3, h, w), dark to light."""
    table = torch.tensor(_HEAT)
    place = values.detach().float().cpu().clamp(0.0, 1.0) * (len(table) - 1)
    low = place.floor().long().clamp(max=len(table) - 2)
    share = (place - low)[..., None]
    return torch.lerp(table[low], table[low + 1], share).movedim(-1, -3)


def enlarge(pictures: torch.Tensor, size: tuple[int, int], smooth: bool = False) -> torch.Tensor:
    """Scales pictures (..., 3, h, w) to (..., 3, *size).

    Args:
        pictures: The pictures.
        size: (height, width) in pixels.
        smooth: Interpolate bilinearly; by default the cells of a map stay visible as rectangles.
    """
    flat = pictures.reshape(-1, *pictures.shape[-3:])
    mode = {"mode": "bilinear", "align_corners": False} if smooth else {"mode": "nearest"}
    return F.interpolate(flat, size, **mode).reshape(*pictures.shape[:-2], *size).clamp(0.0, 1.0)


def blend(image: torch.Tensor, over: torch.Tensor, share: float = 0.6) -> torch.Tensor:
    """Blends two pictures (..., 3, h, w): `share` of `over` and 1 - `share` of `image`."""
    return torch.lerp(image, over, share)


def mark_cell(picture: torch.Tensor, cell: int, grid: tuple[int, int]) -> torch.Tensor:
    """A copy of a picture (3, H, W) with a white frame around one cell of a grid.

    Args:
        picture: The picture.
        cell: Number of the cell, row by row.
        grid: (rows, columns) of the grid that covers the picture.
    """
    (h, w), (height, width) = grid, picture.shape[-2:]
    row, column = divmod(cell, w)
    top, bottom, left, right = (
        row * height // h,
        (row + 1) * height // h,
        column * width // w,
        (column + 1) * width // w,
    )
    line = max(1, min(height, width) // 80)
    framed = picture.clone()
    framed[:, top:bottom, left:right] = 1.0
    inner = (slice(None), slice(top + line, bottom - line), slice(left + line, right - line))
    framed[inner] = picture[inner]
    return framed


def tile(rows: Sequence[Sequence[torch.Tensor]], gap: int = 2) -> torch.Tensor:
    """One picture (3, H, W) of rows of pictures (3, h, w), with white lines of `gap` pixels between them.

    Raises:
        ValueError: There is no picture, or they differ in size.
    """
    sizes = {tuple(picture.shape) for row in rows for picture in row}
    if len(sizes) != 1:
        raise ValueError(f"the pictures of a sheet have the sizes {sorted(sizes)}: they must be of one.")
    (_, h, w), columns = sizes.pop(), max(len(row) for row in rows)
    canvas = torch.ones(3, len(rows) * (h + gap) - gap, columns * (w + gap) - gap)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            canvas[:, i * (h + gap) : i * (h + gap) + h, j * (w + gap) : j * (w + gap) + w] = picture.cpu()
    return canvas


def to_uint8(picture: torch.Tensor) -> torch.Tensor:
    """(3, H, W) floats in 0 to 1 -> (H, W, 3) bytes, as image files hold them."""
    return (picture.clamp(0.0, 1.0) * 255.0).round().to(torch.uint8).permute(1, 2, 0).contiguous()
