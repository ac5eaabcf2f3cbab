"""The dual-view loss in Triton: two launches forward, one backward.

Shape letters: B batch, P tokens (BP padded to a power of two), C channels (BC channels of a tile), L stages that share
one target (1 or 2), R columns of a filter's matrix (BR padded), K splits of the channels of a sample.

A program holds all P tokens of its channels, so one read of each tensor is enough to filter over tokens. Of the spatial
view, with n_s = max(|s|, EPS), n_t = max(|t|, EPS) and cos = <s,t> / (n_s n_t), each token has

    loss = |s|^2 / n_s^2 + |t|^2 / n_t^2 - 2 cos
    dloss/ds = alpha s + beta t,  alpha = 2 cos / n_s^2 (2 / EPS^2 where |s| < EPS),  beta = -2 / (n_s n_t)

The frequency view filters its student tokens f and the target: u = F f, v = F t. The gradient is F (alpha u + beta v),
as F is symmetric. The backward needs alpha and beta of both views beside the inputs: 16 bytes for each token. Sums over
the channels of a token are named by their factors: `ss` is |s|^2, `st` is <s,t>, `uv` is <u,v>.

Arguments such as `s0_b` and `s0_p` are strides: of the first stage's s, from one sample (b) or token (p) to the next.
They are declared int64, so that a launch compiles the same kernel as the tests do, whatever the sizes of the tensors.
"""

from __future__ import annotations

import triton
import triton.language as tl

from scalekd_ds.kernels.interpreted import dot, saturating_cast

# what the filter F does, where it drops the mean beside that: MEAN nothing more; LOW_RANK x - Q Q^T x with Q (P, R), by
# two matrix products; SWEEP the same, by one column of Q after the other; DENSE one product with a matrix (P, P)
MEAN, LOW_RANK, DENSE, SWEEP = 0, 1, 2, 3


@triton.jit
def _load_filter(q_ptr, tokens, P, R: tl.constexpr, BP: tl.constexpr, BR: tl.constexpr, KIND: tl.constexpr):
    """The filter's matrix [BP, BR], where its kind multiplies by the whole of it."""
    if KIND == 0 or KIND == 3:
        q = tl.zeros([1, 1], tl.float32)
    else:
        columns = tl.arange(0, BR)
        inside = (tokens < P)[:, None] & (columns < R)[None, :]
        q = tl.load(q_ptr + tokens[:, None] * R + columns[None, :], mask=inside, other=0.0)
    return q


@triton.jit
def _high_pass(
    x,
    q,
    q_ptr,
    tokens,
    valid,
    P,
    R: tl.constexpr,
    KIND: tl.constexpr,
    DROPS_MEAN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """F x of a tile [BP, BC], whose rows from P on are zero and stay zero."""
    if DROPS_MEAN:
        # in float32: the mean of real features is far larger than the rest, which rounding it to tf32 would spoil
        mean = tl.sum(x, axis=0) / P
        x = tl.where(valid[:, None], x - mean[None, :], 0.0)
    if KIND == 1:
        low = dot(tl.trans(q), x, PRECISION)
        x = x - dot(q, low, PRECISION)
    elif KIND == 2:
        x = dot(q, x, PRECISION)
    elif KIND == 3:
        for r in tl.range(0, R):
            column = tl.load(q_ptr + tokens * R + r, mask=valid, other=0.0)
            x -= column[:, None] * tl.sum(x * column[:, None], axis=0)[None, :]
    return x


@triton.jit
def _load_tile(ptr, b, stride_b, stride_p, tokens, channels, inside):
    """The tile [BP, BC] of sample b in float32, zero outside of the tensor."""
    offsets = b * stride_b + tokens[:, None].to(tl.int64) * stride_p + channels[None, :]
    return tl.load(ptr + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def dual_view_sums_kernel(
    s0_ptr, f0_ptr, s1_ptr, f1_ptr, t_ptr, q_ptr, sums_ptr,
    s0_b: tl.int64, s0_p: tl.int64, f0_b: tl.int64, f0_p: tl.int64, s1_b: tl.int64, s1_p: tl.int64,
    f1_b: tl.int64, f1_p: tl.int64, t_b: tl.int64, t_p: tl.int64,
    P, C: tl.constexpr, K: tl.constexpr, L: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
    R: tl.constexpr, BR: tl.constexpr, KIND: tl.constexpr, DROPS_MEAN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sums (B, K, 2 + 5 L, P) over the channels of a split: tt, vv, then ss, st, ff, uu, uv of each stage."""
    b = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    tokens = tl.arange(0, BP)
    valid = tokens < P
    q = _load_filter(q_ptr, tokens, P, R, BP, BR, KIND)
    zero = tl.zeros([BP], tl.float32)
    tt = zero
    vv = zero
    ss0 = zero
    st0 = zero
    ff0 = zero
    uu0 = zero
    uv0 = zero
    ss1 = zero
    st1 = zero
    ff1 = zero
    uu1 = zero
    uv1 = zero
    BLOCKS: tl.constexpr = ((C + BC - 1) // BC + K - 1) // K
    for i in tl.range(0, BLOCKS):
        channels = (split * BLOCKS + i) * BC + tl.arange(0, BC)
        inside = valid[:, None] & (channels < C)[None, :]
        t = _load_tile(t_ptr, b, t_b, t_p, tokens, channels, inside)
        tt += tl.sum(t * t, 1)
        s = _load_tile(s0_ptr, b, s0_b, s0_p, tokens, channels, inside)
        ss0 += tl.sum(s * s, 1)
        st0 += tl.sum(s * t, 1)
        if L == 2:
            s = _load_tile(s1_ptr, b, s1_b, s1_p, tokens, channels, inside)
            ss1 += tl.sum(s * s, 1)
            st1 += tl.sum(s * t, 1)
        v = _high_pass(t, q, q_ptr, tokens, valid, P, R, KIND, DROPS_MEAN, PRECISION)
        vv += tl.sum(v * v, 1)
        f = _load_tile(f0_ptr, b, f0_b, f0_p, tokens, channels, inside)
        ff0 += tl.sum(f * f, 1)
        f = _high_pass(f, q, q_ptr, tokens, valid, P, R, KIND, DROPS_MEAN, PRECISION)
        uu0 += tl.sum(f * f, 1)
        uv0 += tl.sum(f * v, 1)
        if L == 2:
            f = _load_tile(f1_ptr, b, f1_b, f1_p, tokens, channels, inside)
            ff1 += tl.sum(f * f, 1)
            f = _high_pass(f, q, q_ptr, tokens, valid, P, R, KIND, DROPS_MEAN, PRECISION)
            uu1 += tl.sum(f * f, 1)
            uv1 += tl.sum(f * v, 1)
    out = sums_ptr + (b * K + split) * (2 + 5 * L) * P + tokens
    tl.store(out, tt, mask=valid)
    tl.store(out + P, vv, mask=valid)
    tl.store(out + 2 * P, ss0, mask=valid)
    tl.store(out + 3 * P, st0, mask=valid)
    tl.store(out + 4 * P, ff0, mask=valid)
    tl.store(out + 5 * P, uu0, mask=valid)
    tl.store(out + 6 * P, uv0, mask=valid)
    if L == 2:
        tl.store(out + 7 * P, ss1, mask=valid)
        tl.store(out + 8 * P, st1, mask=valid)
        tl.store(out + 9 * P, ff1, mask=valid)
        tl.store(out + 10 * P, uu1, mask=valid)
        tl.store(out + 11 * P, uv1, mask=valid)


@triton.jit
def _sum_over_splits(sums_ptr, row, tokens, valid, P, ROWS: tl.constexpr, K: tl.constexpr, BP: tl.constexpr):
    """One of the sums of each token, over all channels."""
    total = tl.zeros([BP], tl.float32)
    for k in tl.static_range(K):
        total += tl.load(sums_ptr + (k * ROWS + row) * P + tokens, mask=valid, other=0.0)
    return total


@triton.jit
def _coefficients(ss, tt, st, EPS: tl.constexpr):
    """Loss of each token, and alpha and beta of its gradient."""
    s_rnorm = 1.0 / tl.maximum(tl.sqrt(ss), EPS)
    t_rnorm = 1.0 / tl.maximum(tl.sqrt(tt), EPS)
    cos = (st * s_rnorm) * t_rnorm
    loss = (ss * s_rnorm) * s_rnorm + (tt * t_rnorm) * t_rnorm - 2.0 * cos
    clamped = tl.sqrt(ss) < EPS
    return loss, tl.where(clamped, 2.0 * s_rnorm, 2.0 * cos * s_rnorm) * s_rnorm, -2.0 * s_rnorm * t_rnorm


@triton.jit
def dual_view_finish_kernel(
    sums_ptr, coef_ptr, loss_ptr, spatial_0, frequency_0, spatial_1, frequency_1, P,
    K: tl.constexpr, L: tl.constexpr, BP: tl.constexpr, EPS: tl.constexpr, NOISE: tl.constexpr,
):  # fmt: skip
    """coef (L, B, 4, P): weighted alpha and beta of the spatial, then of the frequency view; loss (B, L, 2).

    `spatial_0` to `frequency_1` are the weights of each stage and view, already divided by B: as arguments of the launch
    they need no copy to the device. NOISE is the square of the reference's.
    """
    b = tl.program_id(0).to(tl.int64)
    batch = tl.num_programs(0)
    tokens = tl.arange(0, BP)
    valid = tokens < P
    ROWS: tl.constexpr = 2 + 5 * L
    sums = sums_ptr + b * K * ROWS * P
    tt = _sum_over_splits(sums, 0, tokens, valid, P, ROWS, K, BP)
    vv = _sum_over_splits(sums, 1, tokens, valid, P, ROWS, K, BP)
    # rounding noise of a map that is constant over tokens counts as zero and passes no gradient
    v_noise = vv <= NOISE * tl.max(tt, 0)
    vv = tl.where(v_noise, 0.0, vv)
    for stage in tl.static_range(L):
        ss = _sum_over_splits(sums, 2 + 5 * stage, tokens, valid, P, ROWS, K, BP)
        st = _sum_over_splits(sums, 3 + 5 * stage, tokens, valid, P, ROWS, K, BP)
        ff = _sum_over_splits(sums, 4 + 5 * stage, tokens, valid, P, ROWS, K, BP)
        uu = _sum_over_splits(sums, 5 + 5 * stage, tokens, valid, P, ROWS, K, BP)
        uv = _sum_over_splits(sums, 6 + 5 * stage, tokens, valid, P, ROWS, K, BP)
        u_noise = uu <= NOISE * tl.max(ff, 0)
        uu = tl.where(u_noise, 0.0, uu)
        uv = tl.where(u_noise | v_noise, 0.0, uv)
        w_spatial = spatial_0 if stage == 0 else spatial_1
        w_frequency = frequency_0 if stage == 0 else frequency_1
        loss, alpha, beta = _coefficients(ss, tt, st, EPS)
        coef = coef_ptr + (stage * batch + b) * 4 * P + tokens
        tl.store(coef, alpha * w_spatial, mask=valid)
        tl.store(coef + P, beta * w_spatial, mask=valid)
        tl.store(loss_ptr + (b * L + stage) * 2, tl.sum(tl.where(valid, loss, 0.0), 0) * w_spatial)
        loss, alpha, beta = _coefficients(uu, vv, uv, EPS)
        alpha = tl.where(u_noise, 0.0, alpha)
        beta = tl.where(u_noise | v_noise, 0.0, beta)
        tl.store(coef + 2 * P, alpha * w_frequency, mask=valid)
        tl.store(coef + 3 * P, beta * w_frequency, mask=valid)
        tl.store(loss_ptr + (b * L + stage) * 2 + 1, tl.sum(tl.where(valid, loss, 0.0), 0) * w_frequency)


@triton.jit
def _gradients(
    s_ptr, f_ptr, ds_ptr, df_ptr, s_b, s_p, f_b, f_p, coef, upstream, b, t, v, q, q_ptr,
    tokens, channels, inside, valid, P, C: tl.constexpr, R: tl.constexpr,
    KIND: tl.constexpr, DROPS_MEAN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ds and df of one stage and tile; `coef` and `upstream` point to what this stage has of them."""
    dloss_spatial = tl.load(upstream)
    dloss_frequency = tl.load(upstream + 1)
    out = b * P * C + tokens[:, None].to(tl.int64) * C + channels[None, :]
    alpha = tl.load(coef, mask=valid, other=0.0) * dloss_spatial
    beta = tl.load(coef + P, mask=valid, other=0.0) * dloss_spatial
    s = _load_tile(s_ptr, b, s_b, s_p, tokens, channels, inside)
    ds = alpha[:, None] * s + beta[:, None] * t
    tl.store(ds_ptr + out, saturating_cast(ds, ds_ptr.dtype.element_ty), mask=inside)
    alpha = tl.load(coef + 2 * P, mask=valid, other=0.0) * dloss_frequency
    beta = tl.load(coef + 3 * P, mask=valid, other=0.0) * dloss_frequency
    f = _load_tile(f_ptr, b, f_b, f_p, tokens, channels, inside)
    f = _high_pass(f, q, q_ptr, tokens, valid, P, R, KIND, DROPS_MEAN, PRECISION)
    df = alpha[:, None] * f + beta[:, None] * v
    df = _high_pass(df, q, q_ptr, tokens, valid, P, R, KIND, DROPS_MEAN, PRECISION)
    tl.store(df_ptr + out, saturating_cast(df, df_ptr.dtype.element_ty), mask=inside)


@triton.jit
def dual_view_backward_kernel(
    s0_ptr, f0_ptr, s1_ptr, f1_ptr, t_ptr, q_ptr, coef_ptr, upstream_ptr, ds0_ptr, df0_ptr, ds1_ptr, df1_ptr,
    s0_b: tl.int64, s0_p: tl.int64, f0_b: tl.int64, f0_p: tl.int64, s1_b: tl.int64, s1_p: tl.int64,
    f1_b: tl.int64, f1_p: tl.int64, t_b: tl.int64, t_p: tl.int64,
    P, C: tl.constexpr, L: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
    R: tl.constexpr, BR: tl.constexpr, KIND: tl.constexpr, DROPS_MEAN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients (B, P, C) of every stage and view, from coef (L, B, 4, P) and the gradient of the losses (L, 2)."""
    b = tl.program_id(0).to(tl.int64)
    batch = tl.num_programs(0)
    channels = tl.program_id(1) * BC + tl.arange(0, BC)
    tokens = tl.arange(0, BP)
    valid = tokens < P
    inside = valid[:, None] & (channels < C)[None, :]
    q = _load_filter(q_ptr, tokens, P, R, BP, BR, KIND)
    t = _load_tile(t_ptr, b, t_b, t_p, tokens, channels, inside)
    v = _high_pass(t, q, q_ptr, tokens, valid, P, R, KIND, DROPS_MEAN, PRECISION)
    coef = coef_ptr + b * 4 * P + tokens
    _gradients(
        s0_ptr, f0_ptr, ds0_ptr, df0_ptr, s0_b, s0_p, f0_b, f0_p, coef, upstream_ptr, b, t, v, q, q_ptr,
        tokens, channels, inside, valid, P, C, R, KIND, DROPS_MEAN, PRECISION,
    )  # fmt: skip
    if L == 2:
        coef += batch * 4 * P
        _gradients(
            s1_ptr, f1_ptr, ds1_ptr, df1_ptr, s1_b, s1_p, f1_b, f1_p, coef, upstream_ptr + 2, b, t, v, q, q_ptr,
            tokens, channels, inside, valid, P, C, R, KIND, DROPS_MEAN, PRECISION,
        )  # fmt: skip
