"""Attention of the cross attention projector in Triton, forward and backward, without atomics.

Shape letters: G query groups, B batch (group g serves B/G samples in a row), Q queries, S keys, N heads, D head size
(BD: padded to a power of two), BQ and BS the tile of queries and keys, H samples of a group in one chunk.

q (G, Q, N, D), k and v (B, S, N, D) with any strides but the last; out (B, Q, N, D) contiguous, lse (B, N, Q) float32 in
powers of two. A program of the backward holds dq in registers over a chunk of samples that share their query; the
chunks' float32 parts are summed afterwards, in a fixed order. Strides are declared int64, so that a launch compiles what
the tests compile, whatever the tensors' sizes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from scalekd_ds.kernels.interpreted import dot, store_as


@triton.jit
def _cast(x, dtype: tl.constexpr):
    """float32 `x` to nearest. What overflows float16 becomes inf and NaN stays NaN, or a loss scaler would miss them."""
    if dtype == tl.float16:
        x = x.to(dtype)
    else:
        x = store_as(x, dtype)
    return x


@triton.jit
def _load(ptr, rows, count, stride, D: tl.constexpr, BD: tl.constexpr):
    columns = tl.arange(0, BD)
    inside = (rows < count)[:, None] & (columns < D)[None, :]
    return tl.load(ptr + rows[:, None].to(tl.int64) * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _store(ptr, x, rows, count, stride, D: tl.constexpr, BD: tl.constexpr):
    columns = tl.arange(0, BD)
    inside = (rows < count)[:, None] & (columns < D)[None, :]
    offsets = rows[:, None].to(tl.int64) * stride + columns[None, :]
    tl.store(ptr + offsets, _cast(x, ptr.dtype.element_ty), mask=inside)


@triton.jit
def cap_forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    q_g: tl.int64, q_r: tl.int64, q_n: tl.int64, k_b: tl.int64, k_r: tl.int64, k_n: tl.int64,
    v_b: tl.int64, v_r: tl.int64, v_n: tl.int64,
    per_group, scale,
    Q: tl.constexpr, S: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BQ: tl.constexpr, BS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head and sample; `scale` includes log2(e)."""
    n = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    queries = tl.program_id(0) * BQ + tl.arange(0, BQ)
    q = _load(q_ptr + (b // per_group) * q_g + n * q_n, queries, Q, q_r, D, BD)
    largest = tl.full([BQ], float("-inf"), tl.float32)
    total = tl.zeros([BQ], tl.float32)
    acc = tl.zeros([BQ, BD], tl.float32)
    for j in tl.range(0, (S + BS - 1) // BS):
        keys = j * BS + tl.arange(0, BS)
        k = _load(k_ptr + b * k_b + n * k_n, keys, S, k_r, D, BD)
        scores = dot(q, tl.trans(k), PRECISION) * scale
        scores = tl.where((keys < S)[None, :], scores, float("-inf"))
        now = tl.maximum(largest, tl.max(scores, 1))
        p = tl.exp2(scores - now[:, None])
        shrink = tl.exp2(largest - now)
        total = total * shrink + tl.sum(p, 1)
        v = _load(v_ptr + b * v_b + n * v_n, keys, S, v_r, D, BD)
        acc = acc * shrink[:, None] + dot(_cast(p, v.dtype), v, PRECISION)
        largest = now
    out = out_ptr + b * Q * N * D + n * D
    _store(out, acc / total[:, None], queries, Q, N * D, D, BD)
    tl.store(lse_ptr + (b * N + n) * Q + queries, largest + tl.log2(total), mask=queries < Q)


@triton.jit
def _delta(out, dout):
    return tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)


@triton.jit
def cap_backward_small_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, dout_ptr, dq_ptr, dk_ptr, dv_ptr,
    q_g: tl.int64, q_r: tl.int64, q_n: tl.int64, k_b: tl.int64, k_r: tl.int64, k_n: tl.int64,
    v_b: tl.int64, v_r: tl.int64, v_n: tl.int64, d_b: tl.int64, d_r: tl.int64, d_n: tl.int64,
    per_group, chunks, scale, plain_scale,
    Q: tl.constexpr, S: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BQ: tl.constexpr, BS: tl.constexpr, H: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All of the backward for Q <= BQ and S <= BS: one head, one chunk of samples that share their query."""
    n = tl.program_id(0)
    c = tl.program_id(1).to(tl.int64)
    g = c // chunks
    first = (c % chunks) * H
    queries = tl.arange(0, BQ)
    keys = tl.arange(0, BS)
    q = _load(q_ptr + g * q_g + n * q_n, queries, Q, q_r, D, BD)
    dq = tl.zeros([BQ, BD], tl.float32)
    for i in tl.range(0, H):
        b = g * per_group + first + i
        k = _load(k_ptr + b * k_b + n * k_n, keys, S, k_r, D, BD)
        v = _load(v_ptr + b * v_b + n * v_n, keys, S, v_r, D, BD)
        dout = _load(dout_ptr + b * Q * N * D + n * D, queries, Q, N * D, D, BD)
        out = _load(out_ptr + b * Q * N * D + n * D, queries, Q, N * D, D, BD)
        lse = tl.load(lse_ptr + (b * N + n) * Q + queries, mask=queries < Q, other=float("inf"))
        scores = dot(q, tl.trans(k), PRECISION) * scale
        scores = tl.where((keys < S)[None, :], scores, float("-inf"))
        p = tl.exp2(scores - lse[:, None])
        dv = dot(tl.trans(_cast(p, dout.dtype)), dout, PRECISION)
        _store(dv_ptr + b * d_b + n * d_n, dv, keys, S, d_r, D, BD)
        dp = dot(dout, tl.trans(v), PRECISION)
        ds = _cast(p * (dp - _delta(out, dout)[:, None]) * plain_scale, q.dtype)
        dk = dot(tl.trans(ds), q, PRECISION)
        _store(dk_ptr + b * d_b + n * d_n, dk, keys, S, d_r, D, BD)
        dq += dot(ds, k, PRECISION)
    _store(dq_ptr + c * Q * N * D + n * D, dq, queries, Q, N * D, D, BD)


@triton.jit
def cap_backward_q_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, dout_ptr, dq_ptr, delta_ptr,
    q_g: tl.int64, q_r: tl.int64, q_n: tl.int64, k_b: tl.int64, k_r: tl.int64, k_n: tl.int64,
    v_b: tl.int64, v_r: tl.int64, v_n: tl.int64,
    per_group, chunks, scale, plain_scale,
    Q: tl.constexpr, S: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BQ: tl.constexpr, BS: tl.constexpr, H: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries over a chunk of samples, and delta (B, N, Q) = <out, dout> for the keys' kernel."""
    n = tl.program_id(1)
    c = tl.program_id(2).to(tl.int64)
    g = c // chunks
    first = (c % chunks) * H
    queries = tl.program_id(0) * BQ + tl.arange(0, BQ)
    q = _load(q_ptr + g * q_g + n * q_n, queries, Q, q_r, D, BD)
    dq = tl.zeros([BQ, BD], tl.float32)
    for i in tl.range(0, H):
        b = g * per_group + first + i
        dout = _load(dout_ptr + b * Q * N * D + n * D, queries, Q, N * D, D, BD)
        delta = _delta(_load(out_ptr + b * Q * N * D + n * D, queries, Q, N * D, D, BD), dout)
        tl.store(delta_ptr + (b * N + n) * Q + queries, delta, mask=queries < Q)
        lse = tl.load(lse_ptr + (b * N + n) * Q + queries, mask=queries < Q, other=float("inf"))
        for j in tl.range(0, (S + BS - 1) // BS):
            keys = j * BS + tl.arange(0, BS)
            k = _load(k_ptr + b * k_b + n * k_n, keys, S, k_r, D, BD)
            v = _load(v_ptr + b * v_b + n * v_n, keys, S, v_r, D, BD)
            scores = dot(q, tl.trans(k), PRECISION) * scale
            scores = tl.where((keys < S)[None, :], scores, float("-inf"))
            p = tl.exp2(scores - lse[:, None])
            dp = dot(dout, tl.trans(v), PRECISION)
            ds = _cast(p * (dp - delta[:, None]) * plain_scale, k.dtype)
            dq += dot(ds, k, PRECISION)
    _store(dq_ptr + c * Q * N * D + n * D, dq, queries, Q, N * D, D, BD)


@triton.jit
def cap_backward_kv_kernel(
    q_ptr, k_ptr, v_ptr, lse_ptr, dout_ptr, delta_ptr, dk_ptr, dv_ptr,
    q_g: tl.int64, q_r: tl.int64, q_n: tl.int64, k_b: tl.int64, k_r: tl.int64, k_n: tl.int64,
    v_b: tl.int64, v_r: tl.int64, v_n: tl.int64, d_b: tl.int64, d_r: tl.int64, d_n: tl.int64,
    per_group, scale, plain_scale,
    Q: tl.constexpr, S: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BQ: tl.constexpr, BS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys of one head and sample; scores are held transposed, [BS, BQ]."""
    n = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    keys = tl.program_id(0) * BS + tl.arange(0, BS)
    k = _load(k_ptr + b * k_b + n * k_n, keys, S, k_r, D, BD)
    v = _load(v_ptr + b * v_b + n * v_n, keys, S, v_r, D, BD)
    dk = tl.zeros([BS, BD], tl.float32)
    dv = tl.zeros([BS, BD], tl.float32)
    for i in tl.range(0, (Q + BQ - 1) // BQ):
        queries = i * BQ + tl.arange(0, BQ)
        q = _load(q_ptr + (b // per_group) * q_g + n * q_n, queries, Q, q_r, D, BD)
        dout = _load(dout_ptr + b * Q * N * D + n * D, queries, Q, N * D, D, BD)
        # an infinite lse zeroes the columns past Q; rows past S are never stored
        lse = tl.load(lse_ptr + (b * N + n) * Q + queries, mask=queries < Q, other=float("inf"))
        delta = tl.load(delta_ptr + (b * N + n) * Q + queries, mask=queries < Q, other=0.0)
        p = tl.exp2(dot(k, tl.trans(q), PRECISION) * scale - lse[None, :])
        dv += dot(_cast(p, dout.dtype), dout, PRECISION)
        dp = dot(v, tl.trans(dout), PRECISION)
        dk += dot(_cast(p * (dp - delta[None, :]) * plain_scale, q.dtype), q, PRECISION)
    _store(dk_ptr + b * d_b + n * d_n, dk, keys, S, d_r, D, BD)
    _store(dv_ptr + b * d_b + n * d_n, dv, keys, S, d_r, D, BD)
