"""Operations that Triton's interpreter (TRITON_INTERPRET=1) computes otherwise than a GPU, corrected in one place."""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

# whether kernels run in the interpreter; Triton decides when it decorates a kernel, so for the whole process
INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def saturating_cast(x, dtype: tl.constexpr):
    """Rounds a float32 tile to the nearest number of `dtype`; float16 saturates, and NaN stays NaN."""
    if dtype == tl.float16:
        # the gradient of a token of zeros is about 1e12 by definition: the largest finite number, instead of inf
        x = tl.where(x > 65504.0, 65504.0, x)
        x = tl.where(x < -65504.0, -65504.0, x)
    if INTERPRETED and dtype == tl.bfloat16:
        # the interpreter truncates, so round to nearest even here
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def nearest_cast(x, dtype: tl.constexpr):
    """Rounds a float32 tile to the nearest number of `dtype`; float16 overflows to inf, which loss scalers look for."""
    if dtype == tl.float16:
        x = x.to(dtype)
    else:
        x = saturating_cast(x, dtype)
    return x


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """`tl.dot`, summed in float32."""
    if INTERPRETED:
        # the interpreter would multiply the bit patterns of bfloat16 as integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)
