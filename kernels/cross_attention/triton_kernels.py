"""The projector's attention in Triton, forward and backward, without atomics.

Shape letters: B batch, G query groups (each serves B/G consecutive samples), Q queries, S keys, N heads, D head size
(BD padded to a power of two), BQ and BS queries and keys of a tile, H samples of a group in one chunk.

q is (G, Q, N, D), k and v are (B, S, N, D); their last axis is contiguous, the others have any strides. out is
(B, Q, N, D), contiguous. lse (B, N, Q), in float32, is the base-2 logarithm of the sum of exp(scores). Arguments such
as `k_b`, `k_r` and `k_n` are strides: of k, from one sample (b), token row (r) or head (n) to the next; `q_g` is that
from one group to the next, and `d_*` are those of dk and dv, which are equal.

A program of the backward holds dq in registers over a chunk of samples that share their query; the chunks' float32
parts are summed afterwards, in a fixed order. Strides are declared int64, so that a launch compiles the same kernel as
the tests do, whatever the sizes of the tensors are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from scalekd_ds.kernels.interpreted import dot, nearest_cast


@triton.jit
def _load(ptr, rows, count, stride, D: tl.constexpr, BD: tl.constexpr):
    """The tile [rows, BD] of one head; zero from row `count` and column D on."""
    columns = tl.arange(0, BD)
    inside = (rows < count)[:, None] & (columns < D)[None, :]
    return tl.load(ptr + rows[:, None].to(tl.int64) * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _store(ptr, x, rows, count, stride, D: tl.constexpr, BD: tl.constexpr):
    """Writes the tile [rows, BD] of one head, in the type of its destination."""
    columns = tl.arange(0, BD)
    inside = (rows < count)[:, None] & (columns < D)[None, :]
    offsets = rows[:, None].to(tl.int64) * stride + columns[None, :]
    tl.store(ptr + offsets, nearest_cast(x, ptr.dtype.element_ty), mask=inside)


@triton.jit
def cap_forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    q_g: tl.int64, q_r: tl.int64, q_n: tl.int64, k_b: tl.int64, k_r: tl.int64, k_n: tl.int64,
    v_b: tl.int64, v_r: tl.int64, v_n: tl.int64,
    per_group, log2_scale,
    Q: tl.constexpr, S: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BQ: tl.constexpr, BS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out and lse of one tile of queries of one head and sample; `log2_scale` is the scale times log2(e)."""
    n = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    queries = tl.program_id(0) * BQ + tl.arange(0, BQ)
    q = _load(q_ptr + (b // per_group) * q_g + n * q_n, queries, Q, q_r, D, BD)
    row_max = tl.full([BQ], float("-inf"), tl.float32)
    row_sum = tl.zeros([BQ], tl.float32)
    acc = tl.zeros([BQ, BD], tl.float32)
    for j in tl.range(0, (S + BS - 1) // BS):
        keys = j * BS + tl.arange(0, BS)
        k = _load(k_ptr + b * k_b + n * k_n, keys, S, k_r, D, BD)
        scores = dot(q, tl.trans(k), PRECISION) * log2_scale
        scores = tl.where((keys < S)[None, :], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        p = tl.exp2(scores - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        v = _load(v_ptr + b * v_b + n * v_n, keys, S, v_r, D, BD)
        acc = acc * rescale[:, None] + dot(nearest_cast(p, v.dtype), v, PRECISION)
        row_max = new_max
    out = out_ptr + b * Q * N * D + n * D
    _store(out, acc / row_sum[:, None], queries, Q, N * D, D, BD)
    tl.store(lse_ptr + (b * N + n) * Q + queries, row_max + tl.log2(row_sum), mask=queries < Q)


@triton.jit
def _delta(out, dout):
    """<out, dout> of each query, which the gradient of softmax subtracts."""
    return tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)


@triton.jit
def cap_backward_small_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, dout_ptr, dq_ptr, dk_ptr, dv_ptr,
    q_g: tl.int64, q_r: tl.int64, q_n: tl.int64, k_b: tl.int64, k_r: tl.int64, k_n: tl.int64,
    v_b: tl.int64, v_r: tl.int64, v_n: tl.int64, d_b: tl.int64, d_r: tl.int64, d_n: tl.int64,
    per_group, chunks, log2_scale, scale,
    Q: tl.constexpr, S: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BQ: tl.constexpr, BS: tl.constexpr, H: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk and dv where Q <= BQ and S <= BS, of one head and one chunk of samples that share their query."""
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
        scores = dot(q, tl.trans(k), PRECISION) * log2_scale
        scores = tl.where((keys < S)[None, :], scores, float("-inf"))
        p = tl.exp2(scores - lse[:, None])
        dv = dot(tl.trans(nearest_cast(p, dout.dtype)), dout, PRECISION)
        _store(dv_ptr + b * d_b + n * d_n, dv, keys, S, d_r, D, BD)
        dp = dot(dout, tl.trans(v), PRECISION)
        ds = nearest_cast(p * (dp - _delta(out, dout)[:, None]) * scale, q.dtype)
        dk = dot(tl.trans(ds), q, PRECISION)
        _store(dk_ptr + b * d_b + n * d_n, dk, keys, S, d_r, D, BD)
        dq += dot(ds, k, PRECISION)
    _store(dq_ptr + c * Q * N * D + n * D, dq, queries, Q, N * D, D, BD)


@triton.jit
def cap_backward_q_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, dout_ptr, dq_ptr, delta_ptr,
    q_g: tl.int64, q_r: tl.int64, q_n: tl.int64, k_b: tl.int64, k_r: tl.int64, k_n: tl.int64,
    v_b: tl.int64, v_r: tl.int64, v_n: tl.int64,
    per_group, chunks, log2_scale, scale,
    Q: tl.constexpr, S: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BQ: tl.constexpr, BS: tl.constexpr, H: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries over a chunk of samples; also stores delta (B, N, Q) for the kernel of dk and dv."""
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
            scores = dot(q, tl.trans(k), PRECISION) * log2_scale
            scores = tl.where((keys < S)[None, :], scores, float("-inf"))
            p = tl.exp2(scores - lse[:, None])
            dp = dot(dout, tl.trans(v), PRECISION)
            ds = nearest_cast(p * (dp - delta[:, None]) * scale, k.dtype)
            dq += dot(ds, k, PRECISION)
    _store(dq_ptr + c * Q * N * D + n * D, dq, queries, Q, N * D, D, BD)


@triton.jit
def cap_backward_kv_kernel(
    q_ptr, k_ptr, v_ptr, lse_ptr, dout_ptr, delta_ptr, dk_ptr, dv_ptr,
    q_g: tl.int64, q_r: tl.int64, q_n: tl.int64, k_b: tl.int64, k_r: tl.int64, k_n: tl.int64,
    v_b: tl.int64, v_r: tl.int64, v_n: tl.int64, d_b: tl.int64, d_r: tl.int64, d_n: tl.int64,
    per_group, log2_scale, scale,
    Q: tl.constexpr, S: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BQ: tl.constexpr, BS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys of one head and sample; the scores are transposed, [BS, BQ]."""
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
        # an infinite lse makes p zero in the columns from Q on; rows from S on are never stored
        lse = tl.load(lse_ptr + (b * N + n) * Q + queries, mask=queries < Q, other=float("inf"))
        delta = tl.load(delta_ptr + (b * N + n) * Q + queries, mask=queries < Q, other=0.0)
        p = tl.exp2(dot(k, tl.trans(q), PRECISION) * log2_scale - lse[None, :])
        dv += dot(nearest_cast(p, dout.dtype), dout, PRECISION)
        dp = dot(v, tl.trans(dout), PRECISION)
        dk += dot(nearest_cast(p * (dp - delta[None, :]) * scale, q.dtype), q, PRECISION)
    _store(dk_ptr + b * d_b + n * d_n, dk, keys, S, d_r, D, BD)
    _store(dv_ptr + b * d_b + n * d_n, dv, keys, S, d_r, D, BD)
