"""What Triton's interpreter (TRITON_INTERPRET=1) does differently from a GPU, put right in one place."""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

# read when a kernel is decorated, so it holds for the whole process
INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def store_as(x, dtype: tl.constexpr):
    """float32 `x` in the dtype of its destination, to nearest, float16 saturated."""
    if dtype == tl.float16:
        # a token of zeros has a gradient of 1e12 by definition: the largest finite number instead of inf,
        # and NaN as it is
        x = tl.where(x > 65504.0, 65504.0, x)
        x = tl.where(x < -65504.0, -65504.0, x)
    if INTERPRETED and dtype == tl.bfloat16:
        # the interpreter truncates: round to nearest even by hand
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """`tl.dot` in float32 sums; the interpreter would multiply the raw bit patterns of bfloat16."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)
