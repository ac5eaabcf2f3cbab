"""Attention in shifted windows of a map, in plain PyTorch: its specification, in the order of operations of timm.

Shape letters: B batch, H and W rows and columns of the map, N heads, D head size, n windows of a map, T tokens of a window,
S the same padded to a multiple of 16, which is the stride of a row of the constant.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

# rows of the constant begin at multiples of this: PyTorch's memory-efficient attention copies one whose rows do not
ROW = 16
# what timm adds to the score of two tokens that are neighbours in a rolled map alone
MASKED = -100.0
Size = tuple[int, int]


def padded_size(grid: Size, window: Size) -> Size:
    """(rows, columns) of the map, padded to whole windows."""
    return -(-grid[0] // window[0]) * window[0], -(-grid[1] // window[1]) * window[1]


def partition(
    x: torch.Tensor, window: Size, shift: Size, pad: torch.Tensor | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Rolls a map back by `shift`, pads it below and to the right, and cuts it into windows.

    Args:
        x: (B, H, W, ...) map.
        window: (rows, columns) of a window.
        shift: (rows, columns) of the cyclic shift.
        pad: (...) token that it is padded with; None is one of zeros.
        dtype: Type of the windows; None is that of the map. A cast and the copy of the windows are one pass.

    Returns:
        (B * n, T, ...), the windows of an image row by row.
    """
    grid = (x.shape[1], x.shape[2])
    rows, columns = padded_size(grid, window)
    if any(shift):
        x = torch.roll(x, (-shift[0], -shift[1]), (1, 2))
    if (rows, columns) != grid:
        missing = (0, columns - grid[1], 0, rows - grid[0])
        x = F.pad(x, (0, 0) * (x.dim() - 3) + missing)
        if pad is not None:
            inside = F.pad(torch.ones(grid, dtype=torch.bool, device=x.device), missing)
            x = torch.where(inside.view(rows, columns, *(1,) * pad.dim()), x, pad.to(x.dtype))
    x = x.unflatten(2, (columns // window[1], window[1])).unflatten(1, (rows // window[0], window[0]))
    x = x.transpose(2, 3).to(dtype or x.dtype, memory_format=torch.contiguous_format)
    return x.flatten(3, 4).flatten(0, 2)


def merge(windows: torch.Tensor, grid: Size, window: Size, shift: Size) -> torch.Tensor:
    """Undoes `partition`: (B * n, T, ...) -> (B, H, W, ...)."""
    rows, columns = padded_size(grid, window)
    n_rows, n_columns = rows // window[0], columns // window[1]
    x = windows.unflatten(1, window).unflatten(0, (-1, n_rows, n_columns))
    x = x.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, : grid[0], : grid[1]]
    return torch.roll(x, shift, (1, 2)) if any(shift) else x


def mask_of(grid: Size, window: Size, shift: Size, **kwargs: Any) -> torch.Tensor:
    """(n, T, T) that keeps tokens apart which only the roll has made neighbours: 0, or -100; `kwargs` are of `zeros`.

    Without a shift there is nothing to keep apart, and n is 1.
    """
    T = window[0] * window[1]
    if not any(shift):
        return torch.zeros(1, T, T, **kwargs)
    rows, columns = padded_size(grid, window)
    regions = torch.zeros(1, rows, columns, **kwargs)
    # three strips of each axis, also where the shift of one of them is 0, in which timm's last strip is the whole axis
    count = 0
    for row in (slice(0, -window[0]), slice(-window[0], -shift[0]), slice(-shift[0], None)):
        for column in (slice(0, -window[1]), slice(-window[1], -shift[1]), slice(-shift[1], None)):
            regions[:, row, column] = count
            count += 1
    region = partition(regions, window, (0, 0))
    return torch.zeros_like(region[:, :, None] - region[:, None]).masked_fill(
        region[:, :, None] != region[:, None], MASKED
    )


def constant_of(bias: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What is added to the scores, in rows that begin at multiples of 16 elements.

    Args:
        bias: (N, T, T) position bias.
        mask: (n or 1, T, T), of `mask_of`.

    Returns:
        (n or 1, N, T, S); the columns from T on are zero, and of no meaning.
    """
    both = bias[None] + mask[:, None].to(bias.dtype)
    return F.pad(both, (0, -both.shape[-1] % ROW))


def window_attention(
    qkv: torch.Tensor,
    constant: torch.Tensor,
    window: Size,
    shift: Size,
    scale: float,
    head_scale: torch.Tensor | None = None,
    pad: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(scale q k^T + constant) v in each window of a map (Swin, section 3.2).

    Args:
        qkv: (B, H, W, 3, N, D) queries, keys and values.
        constant: (n or 1, N, T, at least T), of `constant_of`.
        window: (rows, columns) of a window, T = rows * columns.
        shift: (rows, columns) by which the windows are shifted, cyclically.
        scale: Factor of q k^T.
        head_scale: (N,) of cosine attention (Swin v2, section 3.2): queries and keys are normalised first, and the product is
            multiplied by it too. None is plain attention.
        pad: (3, N, D) query, key and value of the tokens that fill up the last windows; None is zeros.

    Returns:
        (B, H, W, N, D).
    """
    q, k, v = partition(qkv, window, shift, pad).permute(2, 0, 3, 1, 4).unbind(0)
    if head_scale is not None:
        q, k = F.normalize(q, dim=-1) * head_scale[:, None, None].to(q.dtype), F.normalize(k, dim=-1)
    scores = (q * scale) @ k.mT
    T = scores.shape[-1]
    scores = (scores.unflatten(0, (-1, constant.shape[0])) + constant[..., :T]).flatten(0, 1)
    return merge((scores.softmax(-1) @ v).transpose(1, 2), (qkv.shape[1], qkv.shape[2]), window, shift)
