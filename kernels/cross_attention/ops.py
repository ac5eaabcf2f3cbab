"""The projector's attention as PyTorch operators: launchers, fake kernels and autograd.

`scalekd_ds::cap_attention` runs the Triton kernels on CUDA tensors of 16 bits and under the interpreter, and the same
arithmetic in PyTorch on others, so that `opcheck` and `torch.compile` can be tested without a GPU. The gradients of k
and v share one buffer (B, S, 2, N, D), which is the layout of the fused projection that k and v come from.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton

from scalekd_ds.kernels.cross_attention import triton_kernels as kernels
from scalekd_ds.kernels.cross_attention.arguments import check_arguments
from scalekd_ds.kernels.cross_attention.reference import expand_groups
from scalekd_ds.kernels.interpreted import INTERPRETED

# largest head size, and largest number of queries or of keys, that the kernels take
MAX_HEAD_SIZE, MAX_TOKENS = 256, 1024
# largest number of queries or of keys for which one launch does the whole backward
MAX_SMALL_TOKENS = 64
# samples of a group whose dq one program sums in registers
MAX_CHUNK = 4


def supports(head_size: int, queries: int, keys: int, dtype: torch.dtype) -> bool:
    """Whether the kernels take these sizes. They do not take float32, whose backward in three tf32 products spills.

    Args:
        head_size: D.
        queries: Q.
        keys: S.
        dtype: Type of q, k and v.
    """
    fits = head_size % 8 == 0 and 8 <= head_size <= MAX_HEAD_SIZE and max(queries, keys) <= MAX_TOKENS
    return fits and dtype in (torch.bfloat16, torch.float16)


class Tile(NamedTuple):
    """The part of the work that one program of a launch does.

    Attributes:
        head: Head size, padded to a power of two.
        queries: Queries of a program.
        keys: Keys of a program, or of each turn of its loop.
        warps: Warps of a program.
        stages: Stages of Triton's software pipeline.
    """

    head: int
    queries: int
    keys: int
    warps: int
    stages: int = 2


def tiles(head_size: int) -> tuple[Tile, Tile]:
    """The tiles of the forward and of the backward for dq; that for dk and dv swaps queries and keys.

    Chosen so that no kernel spills registers on sm_90, which tests/kernels checks.
    """
    padded = max(16, triton.next_power_of_2(head_size))
    if padded > 128:
        # rows that are not aligned to 16 elements need more registers
        return Tile(padded, 64 if head_size % 16 == 0 else 32, 32, 8, 1), Tile(padded, 32, 32, 8)
    tile = Tile(padded, 64, 64, 4 if padded <= 64 else 8)
    return tile, tile


def is_small(head_size: int, queries: int, keys: int) -> bool:
    """Whether one launch does the whole backward; it spills for wider heads, and for unaligned ones above 64."""
    return max(queries, keys) <= MAX_SMALL_TOKENS and (head_size <= 64 or (head_size <= 128 and head_size % 16 == 0))


def _shared_arguments(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[tuple[int, ...], int, float, dict[str, int]]:
    """What every kernel takes: strides, samples of a group, scale for powers of two, and sizes by name."""
    G, Q, N, D = q.shape
    B, S = k.shape[:2]
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    sizes = {"Q": Q, "S": S, "N": N, "D": D}
    return strides, B // G, scale * math.log2(math.e), sizes


def _launch_options(tile: Tile, by_keys: bool = False) -> dict:
    """Constants and options of a launch; `by_keys` where a program has a tile of keys and loops over queries."""
    queries, keys = (tile.keys, tile.queries) if by_keys else (tile.queries, tile.keys)
    blocks = {"BD": tile.head, "BQ": queries, "BS": keys, "PRECISION": "ieee"}
    return blocks | {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}


def _triton_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    (_, Q, N, D), B = q.shape, k.shape[0]
    strides, per_group, log2_scale, sizes = _shared_arguments(q, k, v, scale)
    tile = tiles(D)[0]
    out = torch.empty(B, Q, N, D, device=k.device, dtype=k.dtype)
    lse = torch.empty(B, N, Q, device=k.device, dtype=torch.float32)
    grid = (triton.cdiv(Q, tile.queries), N, B)
    # Triton launches on the current device, whatever the tensors' own is
    with torch.cuda.device_of(k):
        kernels.cap_forward_kernel[grid](
            q, k, v, out, lse, *strides, per_group, log2_scale, **sizes, **_launch_options(tile)
        )  # fmt: skip
    return out, lse


def _triton_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    (G, Q, N, D), (B, S) = q.shape, k.shape[:2]
    strides, per_group, log2_scale, sizes = _shared_arguments(q, k, v, scale)
    tile = tiles(D)[1]
    dout = dout.contiguous()
    chunk = next(c for c in range(min(MAX_CHUNK, per_group), 0, -1) if per_group % c == 0)
    chunks = per_group // chunk
    dq = torch.empty(G * chunks, Q, N, D, device=q.device, dtype=q.dtype if chunks == 1 else torch.float32)
    dkv = torch.empty(B, S, 2, N, D, device=k.device, dtype=k.dtype)
    dk, dv = dkv.unbind(2)
    with torch.cuda.device_of(k):
        if is_small(D, Q, S):
            kernels.cap_backward_small_kernel[(N, G * chunks)](
                q, k, v, out, lse, dout, dq, dk, dv, *strides, *dk.stride()[:3], per_group, chunks, log2_scale, scale,
                H=chunk, **sizes, **_launch_options(tile),
            )  # fmt: skip
        else:
            delta = torch.empty_like(lse)
            kernels.cap_backward_q_kernel[(triton.cdiv(Q, tile.queries), N, G * chunks)](
                q, k, v, out, lse, dout, dq, delta, *strides, per_group, chunks, log2_scale, scale,
                H=chunk, **sizes, **_launch_options(tile),
            )  # fmt: skip
            kernels.cap_backward_kv_kernel[(triton.cdiv(S, tile.queries), N, B)](
                q, k, v, lse, dout, delta, dk, dv, *strides, *dk.stride()[:3], per_group, log2_scale, scale,
                **sizes, **_launch_options(tile, by_keys=True),
            )  # fmt: skip
    if chunks > 1:
        dq = dq.unflatten(0, (G, chunks)).sum(1).to(q.dtype)
    return dq, dkv


def _scores(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """scale q k^T, (B, N, Q, S) in float32."""
    return scale * torch.einsum("bqnd,bsnd->bnqs", expand_groups(q.float(), k.shape[0]), k.float())


def _torch_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = _scores(q, k, scale)
    out = torch.einsum("bnqs,bsnd->bqnd", scores.softmax(-1), v.float())
    return out.to(k.dtype).contiguous(), scores.logsumexp(-1) * math.log2(math.e)


def _torch_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    p = (_scores(q, k, scale) - (lse / math.log2(math.e))[..., None]).exp()
    dout = dout.float()
    dv = torch.einsum("bnqs,bqnd->bsnd", p, dout)
    delta = (out.float() * dout).sum(-1).transpose(1, 2)[..., None]
    ds = p * (torch.einsum("bqnd,bsnd->bnqs", dout, v.float()) - delta) * scale
    dk = torch.einsum("bnqs,bqnd->bsnd", ds, expand_groups(q.float(), k.shape[0]))
    dq = torch.einsum("bnqs,bsnd->bqnd", ds, k.float()).unflatten(0, (q.shape[0], -1)).sum(1)
    return dq.to(q.dtype).contiguous(), torch.stack([dk, dv], 2).to(k.dtype)


def _runs_triton(q: torch.Tensor) -> bool:
    """Whether the operators run the Triton kernels, and not the same arithmetic in PyTorch."""
    return INTERPRETED.value or (q.is_cuda and q.dtype != torch.float32)


@torch.library.custom_op("scalekd_ds::cap_attention", mutates_args=())
def cap_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention of the kernels; see `api.cap_attention` for its arguments.

    Returns:
        The output (B, Q, N, D), contiguous; and the base-2 logarithm of the sum of exp(scores), (B, N, Q) in float32,
        which the backward needs.

    Raises:
        ValueError: Arguments that do not fit, or sizes that the kernels do not take.
    """
    check_arguments(q, k, v)
    D, tokens = q.shape[3], max(q.shape[1], k.shape[1])
    if D % 8 or not 8 <= D <= MAX_HEAD_SIZE:
        raise ValueError(f"q has head size {D}: the kernels take multiples of 8 from 8 to {MAX_HEAD_SIZE}.")
    if tokens > MAX_TOKENS:
        raise ValueError(f"q has {q.shape[1]} queries and k {k.shape[1]} keys: the kernels take at most {MAX_TOKENS}.")
    if _runs_triton(q):
        return _triton_forward(q, k, v, scale)
    # autocast would run products that are meant to be in float32 in 16 bits
    with torch.autocast(q.device.type, enabled=False):
        return _torch_forward(q, k, v, scale)


@cap_attention.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    (_, Q, N, D), B = q.shape, k.shape[0]
    return k.new_empty(B, Q, N, D), k.new_empty(B, N, Q, dtype=torch.float32)


@torch.library.custom_op("scalekd_ds::cap_attention_backward", mutates_args=())
def cap_attention_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `cap_attention`.

    Args:
        dout: (B, Q, N, D) gradient of its output.
        q: (G, Q, N, D), as it was given.
        k: (B, S, N, D), as it was given.
        v: (B, S, N, D), as it was given.
        out: (B, Q, N, D) that it returned.
        lse: (B, N, Q) that it returned.
        scale: As it was given.

    Returns:
        dq (G, Q, N, D), and dk and dv in one buffer (B, S, 2, N, D).
    """
    if _runs_triton(q):
        return _triton_backward(dout, q, k, v, out, lse, scale)
    with torch.autocast(q.device.type, enabled=False):
        return _torch_backward(dout, q, k, v, out, lse, scale)


@cap_attention_backward.register_fake
def _(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    B, S, N, D = k.shape
    return q.new_empty(q.shape), k.new_empty(B, S, 2, N, D)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output)


def _backward(ctx: Any, dout: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
    dq, dkv = cap_attention_backward(dout, *ctx.saved_tensors, ctx.scale)
    dk, dv = dkv.unbind(2)
    return dq, dk, dv, None


cap_attention.register_autograd(_backward, setup_context=_setup_context)
