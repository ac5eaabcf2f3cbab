"""Policies' operations in Triton: levels by tables and the histograms behind them, blends, and affine warps.

Shape letters: K images that an operation is for, S x S pixels of 3 channels (HWC, uint8). `places` are their places in the
batch. All arithmetic is Pillow's, in Pillow's order and precision: launches switch the fusion of multiplications and
additions off, because one rounding less gives another level now and then.

Numbers of images are not specialised: they differ from batch to batch, and Triton would compile for 1 and for multiples of
16 anew, in the middle of a training.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _grey(red, green, blue):
    """ITU-R 601-2 in units of 2^-16, rounded; int32."""
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


@triton.jit
def _level(value):
    """A number cut off to 0 to 255, as uint8."""
    return tl.minimum(tl.maximum(value, 0.0), 255.0).to(tl.int32).to(tl.uint8)


@triton.jit
def counts_kernel(images_ptr, places_ptr, counts_ptr, pixels, turns, BLOCK: tl.constexpr):
    """Adds to counts (K, 4, 256) int32 the pixels with each level of red, green, blue and grey; grid (K, splits)."""
    k = tl.program_id(0)
    source = images_ptr + tl.load(places_ptr + k) * pixels * 3
    steps, levels = tl.arange(0, BLOCK), tl.arange(0, 256)
    red_counts = tl.zeros([256], tl.int32)
    green_counts = tl.zeros([256], tl.int32)
    blue_counts = tl.zeros([256], tl.int32)
    grey_counts = tl.zeros([256], tl.int32)
    for turn in range(turns):
        pixel = (tl.program_id(1) * turns + turn) * BLOCK + steps
        valid = pixel < pixels
        red = tl.load(source + pixel * 3, mask=valid, other=0).to(tl.int32)
        green = tl.load(source + pixel * 3 + 1, mask=valid, other=0).to(tl.int32)
        blue = tl.load(source + pixel * 3 + 2, mask=valid, other=0).to(tl.int32)
        red_counts += tl.histogram(red, 256, mask=valid)
        green_counts += tl.histogram(green, 256, mask=valid)
        blue_counts += tl.histogram(blue, 256, mask=valid)
        grey_counts += tl.histogram(_grey(red, green, blue), 256, mask=valid)
    # whole numbers add up to the same in any order
    counts = counts_ptr + k * 4 * 256 + levels
    tl.atomic_add(counts, red_counts)
    tl.atomic_add(counts + 256, green_counts)
    tl.atomic_add(counts + 512, blue_counts)
    tl.atomic_add(counts + 768, grey_counts)


@triton.jit(do_not_specialize=["autocontrast", "equalize"])
def tables_kernel(counts_ptr, factors_ptr, tables_ptr, autocontrast, equalize, pixels):
    """Makes tables (K, 3, 256) uint8 of counts: AutoContrast's first, then Equalize's, then Contrast's; grid (K, 3)."""
    k, channel = tl.program_id(0), tl.program_id(1)
    levels = tl.arange(0, 256)
    counts = tl.load(counts_ptr + (k * 4 + channel) * 256 + levels)
    high = tl.max(tl.where(counts > 0, levels, 0), 0)
    if k < autocontrast:
        low = tl.min(tl.where(counts > 0, levels, 255), 0)
        # a channel of one level is left as it is
        scale = 255.0 / tl.maximum(high - low, 1).to(tl.float64)
        stretched = levels.to(tl.float64) * scale + (-low).to(tl.float64) * scale
        table = tl.where(high > low, _level(stretched), levels.to(tl.uint8))
    elif k < autocontrast + equalize:
        step = (pixels - tl.sum(tl.where(levels == high, counts, 0), 0)) // 255
        below = tl.cumsum(counts, 0) - counts
        equalized = tl.minimum((below + step // 2) // tl.maximum(step, 1), 255)
        # of a channel with one level, or few pixels, nothing can be spread
        table = tl.where(step > 0, equalized, levels).to(tl.uint8)
    else:
        grey = tl.load(counts_ptr + (k * 4 + 3) * 256 + levels)
        total = tl.sum(grey.to(tl.int64) * levels, 0)
        mean = ((2 * total + pixels) // (2 * pixels)).to(tl.float32)
        factor = tl.load(factors_ptr + k - autocontrast - equalize)
        table = _level((levels.to(tl.float32) - mean) * factor + mean)
    tl.store(tables_ptr + (k * 3 + channel) * 256 + levels, table)


@triton.jit(do_not_specialize=["measured"])
def levels_kernel(images_ptr, places_ptr, measured_ptr, fixed_ptr, measured, values, BLOCK: tl.constexpr):
    """Looks levels up in place: tables (measured, 3, 256), then (K - measured, 256) for all channels; grid (K, blocks)."""
    k = tl.program_id(0)
    value = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = value < values
    images = images_ptr + tl.load(places_ptr + k) * values + value
    level = tl.load(images, mask=valid, other=0).to(tl.int32)
    if k < measured:
        new = tl.load(measured_ptr + (k * 3 + value % 3) * 256 + level, mask=valid, other=0)
    else:
        new = tl.load(fixed_ptr + (k - measured) * 256 + level, mask=valid, other=0)
    tl.store(images, new, mask=valid)


@triton.jit(do_not_specialize=["colours"])
def blend_kernel(images_ptr, out_ptr, places_ptr, factors_ptr, colours, S, BLOCK: tl.constexpr):
    """Writes to out (K, S, S, 3) blends with the grey image, of the first `colours`, or a smooth one; grid (K, blocks)."""
    k = tl.program_id(0)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = pixel < S * S
    source = images_ptr + tl.load(places_ptr + k) * S * S * 3 + pixel * 3
    factor = tl.load(factors_ptr + k)
    row, column = pixel // S, pixel % S
    inner = valid & (row > 0) & (row < S - 1) & (column > 0) & (column < S - 1)
    red = tl.load(source, mask=valid, other=0).to(tl.int32)
    green = tl.load(source + 1, mask=valid, other=0).to(tl.int32)
    blue = tl.load(source + 2, mask=valid, other=0).to(tl.int32)
    grey = _grey(red, green, blue)
    for channel in tl.static_range(3):
        if channel == 0:
            level = red
        elif channel == 1:
            level = green
        else:
            level = blue
        if k < colours:
            version = grey
        else:
            total = 4 * level
            for y in tl.static_range(-1, 2):
                for x in tl.static_range(-1, 2):
                    total += tl.load(source + (y * S + x) * 3 + channel, mask=inner, other=0).to(tl.int32)
            # the quotient by 13 to the nearest; pixels at the edge stay as they are
            version = tl.where(inner, (total + 6) // 13, level)
        blended = (level - version).to(tl.float32) * factor + version.to(tl.float32)
        tl.store(out_ptr + (k.to(tl.int64) * S * S + pixel) * 3 + channel, _level(blended), mask=valid)


@triton.jit
def _cubic(v1, v2, v3, v4, d):
    """Pillow's cubic, with a = -0.5, at the share d from v2 to v3."""
    p2 = v3 - v1
    p3 = 2.0 * (v1 - v2) + v3 - v4
    p4 = v2 - v1 - v3 + v4
    return v2 + d * (p2 + d * (p3 + d * p4))


@triton.jit
def _clipped(place, S):
    return tl.minimum(tl.maximum(place, 0), S - 1)


@triton.jit
def _along_row(source, row, column, d, S, mask, CUBIC: tl.constexpr):
    """The value of a row at the share d from one column to the next, in float64."""
    line = source + _clipped(row, S) * S * 3
    v2 = tl.load(line + _clipped(column, S) * 3, mask=mask, other=0).to(tl.float64)
    v3 = tl.load(line + _clipped(column + 1, S) * 3, mask=mask, other=0).to(tl.float64)
    if CUBIC:
        v1 = tl.load(line + _clipped(column - 1, S) * 3, mask=mask, other=0).to(tl.float64)
        v4 = tl.load(line + _clipped(column + 2, S) * 3, mask=mask, other=0).to(tl.float64)
        return _cubic(v1, v2, v3, v4, d)
    else:
        return v2 + (v3 - v2) * d


@triton.jit
def warp_kernel(images_ptr, out_ptr, places_ptr, matrices_ptr, bicubic_ptr, fill_ptr, S, BLOCK: tl.constexpr):
    """Writes images (K, S, S, 3), resampled at the positions of matrices (K, 6) float64, to out; grid (K, blocks)."""
    k = tl.program_id(0)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = pixel < S * S
    source = images_ptr + tl.load(places_ptr + k) * S * S * 3
    out = out_ptr + (k.to(tl.int64) * S * S + pixel) * 3
    # centres of pixels
    x = (pixel % S).to(tl.float64) + 0.5
    y = (pixel // S).to(tl.float64) + 0.5
    matrix = matrices_ptr + k * 6
    from_x = tl.load(matrix) * x + tl.load(matrix + 1) * y + tl.load(matrix + 2)
    from_y = tl.load(matrix + 3) * x + tl.load(matrix + 4) * y + tl.load(matrix + 5)
    inside = valid & (from_x >= 0.0) & (from_x < S) & (from_y >= 0.0) & (from_y < S)
    from_x -= 0.5
    from_y -= 0.5
    column, row = tl.floor(from_x), tl.floor(from_y)
    dx, dy = from_x - column, from_y - row
    column, row = column.to(tl.int32), row.to(tl.int32)
    bicubic = tl.load(bicubic_ptr + k) != 0
    for channel in tl.static_range(3):
        plane = source + channel
        if bicubic:
            v1 = _along_row(plane, row - 1, column, dx, S, inside, True)
            v2 = _along_row(plane, row, column, dx, S, inside, True)
            v3 = _along_row(plane, row + 1, column, dx, S, inside, True)
            v4 = _along_row(plane, row + 2, column, dx, S, inside, True)
            value = _cubic(v1, v2, v3, v4, dy)
        else:
            v2 = _along_row(plane, row, column, dx, S, inside, False)
            v3 = _along_row(plane, row + 1, column, dx, S, inside, False)
            value = v2 + (v3 - v2) * dy
        found = tl.where(inside, _level(value), tl.load(fill_ptr + channel))
        tl.store(out + channel, found, mask=valid)
