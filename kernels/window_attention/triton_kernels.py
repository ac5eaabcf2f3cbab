"""Window attention in Triton, forward and backward, on the map itself: no rolled or partitioned copies, and no atomics.

Shape letters: B batch, H and W rows and columns of the map, n windows of a map, WH and WW rows and columns of a window,
T = WH * WW its tokens, SH and SW the shift, N heads, D head size (BD padded to a power of two), BQ and BS queries and keys
of a tile.

qkv is (B, H, W, 3, N, D); its last axis is contiguous, the others have any strides: from one sample (b), row (h), column (w),
part (p: query, key or value) or head (n) to the next. out is (B, H, W, N, D), and dqkv (B, H, W, 3, N, D), both contiguous.
constant is (n or 1, N, T, any stride of a row); pad is (3, N, D). lse (B * n, N, T), in float32, is the base-2 logarithm of the
sum of exp(scores).

A program has one tile of one window and head. A token of the map belongs to one window, so that every gradient is written
once. Strides are declared int64, so that a launch compiles the same kernel as the tests do, whatever the sizes of the tensors.
"""

from __future__ import annotations

import triton
import triton.language as tl

from scalekd_ds.kernels.interpreted import dot, nearest_cast


@triton.jit
def _place(
    window, tokens, H: tl.constexpr, W: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr
):  # fmt: skip
    """Row and column in the image of a window's tokens, and whether they are there: windows may reach beyond the map."""
    rows = (window // ((W + WW - 1) // WW)) * WH + tokens // WW
    columns = (window % ((W + WW - 1) // WW)) * WW + tokens % WW
    inside = (tokens < WH * WW) & (rows < H) & (columns < W)
    rows += SH
    columns += SW
    return tl.where(rows >= H, rows - H, rows), tl.where(columns >= W, columns - W, columns), inside


@triton.jit
def _load(
    ptr, pad_ptr, rows, columns, inside, tokens, stride_h, stride_w,
    T: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """The tile [tokens, BD] of one head; `pad_ptr` is the token that fills up the last windows. Zero beyond window and head."""
    d = tl.arange(0, BD)
    offsets = rows[:, None].to(tl.int64) * stride_h + columns[:, None].to(tl.int64) * stride_w + d[None, :]
    x = tl.load(ptr + offsets, mask=inside[:, None] & (d < D)[None, :], other=0.0)
    if PADDED:
        pad = tl.load(pad_ptr + d, mask=d < D, other=0.0)
        x = tl.where((inside | (tokens >= T))[:, None], x, pad[None, :].to(x.dtype))
    return x


@triton.jit
def _store(ptr, x, rows, columns, inside, stride_h, stride_w, D: tl.constexpr, BD: tl.constexpr):
    """Writes the tile [tokens, BD] of one head, in the type of its destination."""
    d = tl.arange(0, BD)
    offsets = rows[:, None].to(tl.int64) * stride_h + columns[:, None].to(tl.int64) * stride_w + d[None, :]
    tl.store(ptr + offsets, nearest_cast(x, ptr.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])


@triton.jit
def _constant(ptr, queries, keys, stride, T: tl.constexpr):
    """log2(e) times the constant of a tile [queries, keys]; -inf for keys beyond the window."""
    known = (queries < T)[:, None] & (keys < T)[None, :]
    x = tl.load(ptr + queries[:, None] * stride + keys[None, :], mask=known, other=0.0).to(tl.float32)
    return tl.where((keys < T)[None, :], x * 1.4426950408889634, float("-inf"))


@triton.jit
def _inverse_norm(x):
    """1 / |x| of each row, 1e12 for rows of zeros as in torch.nn.functional.normalize."""
    x = x.to(tl.float32)
    return 1.0 / tl.maximum(tl.sqrt(tl.sum(x * x, 1)), 1e-12)


@triton.jit
def _through_norm(dx, x, inverse):
    """The gradient of rows x, from that of x / |x|, dx."""
    unit = x.to(tl.float32) * inverse[:, None]
    # a row below 1e-12 is divided by a constant, and has no radial part
    radial = tl.where(inverse < 1e12, tl.sum(dx * unit, 1), 0.0)
    return (dx - unit * radial[:, None]) * inverse[:, None]


@triton.jit
def _where(tiles: tl.constexpr, N: tl.constexpr, H: tl.constexpr, W: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr):
    """Head, tile, sample and window of this program; heads go fastest, since they are side by side in memory."""
    windows: tl.constexpr = ((H + WH - 1) // WH) * ((W + WW - 1) // WW)
    n = tl.program_id(0) % N
    rest = tl.program_id(0) // N
    return n, rest % tiles, (rest // tiles // windows).to(tl.int64), rest // tiles % windows


@triton.jit
def window_forward_kernel(
    qkv_ptr, constant_ptr, head_scale_ptr, pad_ptr, out_ptr, lse_ptr,
    q_b: tl.int64, q_h: tl.int64, q_w: tl.int64, q_p: tl.int64, q_n: tl.int64,
    c_window: tl.int64, c_n: tl.int64, c_row: tl.int64, log2_scale,
    H: tl.constexpr, W: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    N: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BQ: tl.constexpr, BS: tl.constexpr,
    COSINE: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out and lse of one tile of queries of one window and head; `log2_scale` is the scale times log2(e)."""
    T: tl.constexpr = WH * WW
    n, tile, b, window = _where((T + BQ - 1) // BQ, N, H, W, WH, WW)
    queries = tile * BQ + tl.arange(0, BQ)
    q_rows, q_columns, q_inside = _place(window, queries, H, W, WH, WW, SH, SW)
    head = qkv_ptr + b * q_b + n * q_n
    q = _load(head, pad_ptr + n * D, q_rows, q_columns, q_inside, queries, q_h, q_w, T, D, BD, PADDED)
    scale = log2_scale
    if COSINE:
        scale *= tl.load(head_scale_ptr + n).to(tl.float32)
        q_scale = _inverse_norm(q) * scale
    constant = constant_ptr + window * c_window + n * c_n
    row_max = tl.full([BQ], float("-inf"), tl.float32)
    row_sum = tl.zeros([BQ], tl.float32)
    acc = tl.zeros([BQ, BD], tl.float32)
    for j in tl.range(0, (T + BS - 1) // BS):
        keys = j * BS + tl.arange(0, BS)
        rows, columns, inside = _place(window, keys, H, W, WH, WW, SH, SW)
        k = _load(head + q_p, pad_ptr + (N + n) * D, rows, columns, inside, keys, q_h, q_w, T, D, BD, PADDED)
        scores = dot(q, tl.trans(k), PRECISION)
        if COSINE:
            scores *= q_scale[:, None] * _inverse_norm(k)[None, :]
        else:
            scores *= scale
        scores += _constant(constant, queries, keys, c_row, T)
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        p = tl.exp2(scores - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        v = _load(head + 2 * q_p, pad_ptr + (2 * N + n) * D, rows, columns, inside, keys, q_h, q_w, T, D, BD, PADDED)
        acc = acc * rescale[:, None] + dot(nearest_cast(p, v.dtype), v, PRECISION)
        row_max = new_max
    out = out_ptr + b * H * W * N * D + n * D
    _store(out, acc / row_sum[:, None], q_rows, q_columns, q_inside, W * N * D, N * D, D, BD)
    windows: tl.constexpr = ((H + WH - 1) // WH) * ((W + WW - 1) // WW)
    lse = lse_ptr + ((b * windows + window) * N + n) * T
    tl.store(lse + queries, row_max + tl.log2(row_sum), mask=queries < T)


@triton.jit
def window_backward_q_kernel(
    qkv_ptr, constant_ptr, head_scale_ptr, pad_ptr, out_ptr, lse_ptr, dout_ptr, dqkv_ptr, delta_ptr,
    q_b: tl.int64, q_h: tl.int64, q_w: tl.int64, q_p: tl.int64, q_n: tl.int64,
    c_window: tl.int64, c_n: tl.int64, c_row: tl.int64, log2_scale, scale,
    H: tl.constexpr, W: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    N: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BQ: tl.constexpr, BS: tl.constexpr,
    COSINE: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries; also stores delta (B * n, N, T), <out, dout>, for the kernel of dk and dv."""
    T: tl.constexpr = WH * WW
    n, tile, b, window = _where((T + BQ - 1) // BQ, N, H, W, WH, WW)
    queries = tile * BQ + tl.arange(0, BQ)
    q_rows, q_columns, q_inside = _place(window, queries, H, W, WH, WW, SH, SW)
    head = qkv_ptr + b * q_b + n * q_n
    q = _load(head, pad_ptr + n * D, q_rows, q_columns, q_inside, queries, q_h, q_w, T, D, BD, PADDED)
    q_norm = tl.full([BQ], 1.0, tl.float32)
    if COSINE:
        head_scale = tl.load(head_scale_ptr + n).to(tl.float32)
        log2_scale *= head_scale
        scale *= head_scale
        q_norm = _inverse_norm(q)
    constant = constant_ptr + window * c_window + n * c_n
    windows: tl.constexpr = ((H + WH - 1) // WH) * ((W + WW - 1) // WW)
    row = ((b * windows + window) * N + n) * T + queries
    lse = tl.load(lse_ptr + row, mask=queries < T, other=float("inf"))
    whole = b * H * W * N * D + n * D
    # the output of a token that is not there has no gradient
    dout = _load(dout_ptr + whole, pad_ptr, q_rows, q_columns, q_inside, queries, W * N * D, N * D, T, D, BD, False)
    out = _load(out_ptr + whole, pad_ptr, q_rows, q_columns, q_inside, queries, W * N * D, N * D, T, D, BD, False)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    tl.store(delta_ptr + row, delta, mask=queries < T)
    dq = tl.zeros([BQ, BD], tl.float32)
    for j in tl.range(0, (T + BS - 1) // BS):
        keys = j * BS + tl.arange(0, BS)
        rows, columns, inside = _place(window, keys, H, W, WH, WW, SH, SW)
        k = _load(head + q_p, pad_ptr + (N + n) * D, rows, columns, inside, keys, q_h, q_w, T, D, BD, PADDED)
        v = _load(head + 2 * q_p, pad_ptr + (2 * N + n) * D, rows, columns, inside, keys, q_h, q_w, T, D, BD, PADDED)
        scores = dot(q, tl.trans(k), PRECISION) * log2_scale
        dp = dot(dout, tl.trans(v), PRECISION)
        if COSINE:
            k_norm = _inverse_norm(k)
            scores *= q_norm[:, None] * k_norm[None, :]
            k = nearest_cast(k.to(tl.float32) * k_norm[:, None], k.dtype)
        p = tl.exp2(scores + _constant(constant, queries, keys, c_row, T) - lse[:, None])
        ds = p * (dp - delta[:, None]) * scale
        dq += dot(nearest_cast(ds, k.dtype), k, PRECISION)
    if COSINE:
        dq = _through_norm(dq, q, q_norm)
    dqkv = dqkv_ptr + b * H * W * 3 * N * D + n * D
    _store(dqkv, dq, q_rows, q_columns, q_inside, W * 3 * N * D, 3 * N * D, D, BD)


@triton.jit
def window_backward_kv_kernel(
    qkv_ptr, constant_ptr, head_scale_ptr, pad_ptr, lse_ptr, dout_ptr, delta_ptr, dqkv_ptr,
    q_b: tl.int64, q_h: tl.int64, q_w: tl.int64, q_p: tl.int64, q_n: tl.int64,
    c_window: tl.int64, c_n: tl.int64, c_row: tl.int64, log2_scale, scale,
    H: tl.constexpr, W: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    N: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BQ: tl.constexpr, BS: tl.constexpr,
    COSINE: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys of one window and head; it loops over queries."""
    T: tl.constexpr = WH * WW
    n, tile, b, window = _where((T + BS - 1) // BS, N, H, W, WH, WW)
    keys = tile * BS + tl.arange(0, BS)
    k_rows, k_columns, k_inside = _place(window, keys, H, W, WH, WW, SH, SW)
    head = qkv_ptr + b * q_b + n * q_n
    k = _load(head + q_p, pad_ptr + (N + n) * D, k_rows, k_columns, k_inside, keys, q_h, q_w, T, D, BD, PADDED)
    v = _load(head + 2 * q_p, pad_ptr + (2 * N + n) * D, k_rows, k_columns, k_inside, keys, q_h, q_w, T, D, BD, PADDED)
    k_norm = tl.full([BS], 1.0, tl.float32)
    if COSINE:
        head_scale = tl.load(head_scale_ptr + n).to(tl.float32)
        log2_scale *= head_scale
        scale *= head_scale
        k_norm = _inverse_norm(k)
    constant = constant_ptr + window * c_window + n * c_n
    windows: tl.constexpr = ((H + WH - 1) // WH) * ((W + WW - 1) // WW)
    first = ((b * windows + window) * N + n) * T
    whole = dout_ptr + b * H * W * N * D + n * D
    dk = tl.zeros([BS, BD], tl.float32)
    dv = tl.zeros([BS, BD], tl.float32)
    for i in tl.range(0, (T + BQ - 1) // BQ):
        queries = i * BQ + tl.arange(0, BQ)
        rows, columns, inside = _place(window, queries, H, W, WH, WW, SH, SW)
        q = _load(head, pad_ptr + n * D, rows, columns, inside, queries, q_h, q_w, T, D, BD, PADDED)
        dout = _load(whole, pad_ptr, rows, columns, inside, queries, W * N * D, N * D, T, D, BD, False)
        # an infinite lse makes p zero in the rows from T on
        lse = tl.load(lse_ptr + first + queries, mask=queries < T, other=float("inf"))
        delta = tl.load(delta_ptr + first + queries, mask=queries < T, other=0.0)
        scores = dot(q, tl.trans(k), PRECISION) * log2_scale
        dp = dot(dout, tl.trans(v), PRECISION)
        if COSINE:
            q_norm = _inverse_norm(q)
            scores *= q_norm[:, None] * k_norm[None, :]
            q = nearest_cast(q.to(tl.float32) * q_norm[:, None], q.dtype)
        p = tl.exp2(scores + _constant(constant, queries, keys, c_row, T) - lse[:, None])
        ds = p * (dp - delta[:, None]) * scale
        dv += dot(tl.trans(nearest_cast(p, dout.dtype)), dout, PRECISION)
        dk += dot(tl.trans(nearest_cast(ds, q.dtype)), q, PRECISION)
    if COSINE:
        dk = _through_norm(dk, k, k_norm)
    dqkv = dqkv_ptr + b * H * W * 3 * N * D + n * D
    _store(dqkv + N * D, dk, k_rows, k_columns, k_inside, W * 3 * N * D, 3 * N * D, D, BD)
    _store(dqkv + 2 * N * D, dv, k_rows, k_columns, k_inside, W * 3 * N * D, 3 * N * D, D, BD)
