"""Window attention as PyTorch operators: launchers, fake kernels and autograd.

`scalekd_ds::window_attention` runs the Triton kernels on CUDA tensors and under the interpreter, and the same arithmetic in
PyTorch on others, so that `opcheck` and `torch.compile` can be tested without a GPU. Bias, mask, scales and padding are
constants of a frozen model: the gradient goes to queries, keys and values alone, in one buffer as they came.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton

from scalekd_ds.kernels.interpreted import INTERPRETED
from scalekd_ds.kernels.window_attention import reference
from scalekd_ds.kernels.window_attention import triton_kernels as kernels
from scalekd_ds.kernels.window_attention.arguments import check_arguments

# head sizes, and the largest number of tokens of a window, that the kernels take
HEAD_SIZES, MAX_TOKENS = range(16, 72, 8), 24 * 24


def supports(head_size: int, tokens: int, dtype: torch.dtype) -> bool:
    """Whether the kernels take heads of this size, windows of so many tokens and this type."""
    return head_size in HEAD_SIZES and tokens <= MAX_TOKENS and dtype in (torch.bfloat16, torch.float16, torch.float32)


class Tile(NamedTuple):
    """The part of the work that one program of a launch does.

    Attributes:
        head: Head size, padded to a power of two.
        queries: Queries of a program, or of each turn of its loop.
        keys: Keys of a program, or of each turn of its loop.
        warps: Warps of a program.
        stages: Stages of Triton's software pipeline.
    """

    head: int
    queries: int
    keys: int
    warps: int = 4
    stages: int = 2


def tile_of(head_size: int, tokens: int, dtype: torch.dtype) -> Tile:
    """The tile of every launch, chosen so that no kernel spills registers on sm_90, which tests/kernels checks."""
    side = 64 if dtype != torch.float32 else 32
    side = min(side, max(16, triton.next_power_of_2(tokens)))
    return Tile(triton.next_power_of_2(head_size), side, side)


def _arguments(
    qkv: torch.Tensor,
    constant: torch.Tensor,
    head_scale: torch.Tensor | None,
    pad: torch.Tensor | None,
    window: reference.Size,
    shift: reference.Size,
    scale: float,
) -> tuple[tuple[Any, ...], tuple[Any, ...], dict[str, Any], Tile, int]:
    """What every kernel takes: tensors, strides and scale, constants and options by name; its tile; the batch's windows."""
    B, H, W, _, N, D = qkv.shape
    tile = tile_of(D, window[0] * window[1], qkv.dtype)
    rows, columns = reference.padded_size((H, W), window)
    padded = (rows, columns) != (H, W)
    if padded and pad is None:
        pad = qkv.new_zeros(3, N, D)
    # a pointer that is never read, where there is nothing to read
    tensors = (
        qkv,
        constant,
        constant if head_scale is None else head_scale,
        pad.contiguous() if padded and pad is not None else qkv,
    )
    strides = (*qkv.stride()[:5], constant.stride(0) if constant.shape[0] > 1 else 0, *constant.stride()[1:3])
    constants: dict[str, Any] = dict(zip(("H", "W", "WH", "WW", "SH", "SW"), (H, W, *window, *shift), strict=True))
    constants |= {"N": N, "D": D, "BD": tile.head, "BQ": tile.queries, "BS": tile.keys}
    constants |= {"COSINE": head_scale is not None, "PADDED": padded, "PRECISION": "ieee"}
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    numbers = (*strides, scale * math.log2(math.e))
    return tensors, numbers, constants | options, tile, B * (rows // window[0]) * (columns // window[1])


def _triton_forward(qkv: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    tensors, numbers, constants, tile, windows = _arguments(qkv, *rest)
    B, H, W, _, N, D = qkv.shape
    T = constants["WH"] * constants["WW"]
    out = torch.empty(B, H, W, N, D, device=qkv.device, dtype=qkv.dtype)
    lse = torch.empty(windows, N, T, device=qkv.device, dtype=torch.float32)
    # Triton launches on the current device, whatever the tensors' own is
    with torch.cuda.device_of(qkv):
        kernels.window_forward_kernel[(windows * N * triton.cdiv(T, tile.queries),)](
            *tensors, out, lse, *numbers, **constants
        )
    return out, lse


def _triton_backward(
    dout: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, qkv: torch.Tensor, *rest: Any
) -> torch.Tensor:
    tensors, numbers, constants, tile, windows = _arguments(qkv, *rest)
    N, T = qkv.shape[4], constants["WH"] * constants["WW"]
    dout, scale = dout.contiguous(), rest[-1]
    dqkv = torch.empty(qkv.shape, device=qkv.device, dtype=qkv.dtype)
    delta = torch.empty_like(lse)
    with torch.cuda.device_of(qkv):
        kernels.window_backward_q_kernel[(windows * N * triton.cdiv(T, tile.queries),)](
            *tensors, out, lse, dout, dqkv, delta, *numbers, scale, **constants
        )
        kernels.window_backward_kv_kernel[(windows * N * triton.cdiv(T, tile.keys),)](
            *tensors, lse, dout, delta, dqkv, *numbers, scale, **constants
        )
    return dqkv


def _scores(
    qkv: torch.Tensor,
    constant: torch.Tensor,
    head_scale: torch.Tensor | None,
    pad: torch.Tensor | None,
    window: reference.Size,
    shift: reference.Size,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v, (B * n, N, T, D), the first two normalised for cosine attention, and scores (B * n, N, T, T): float32."""
    q, k, v = reference.partition(qkv, window, shift, pad).float().permute(2, 0, 3, 1, 4).unbind(0)
    if head_scale is not None:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    scores = q @ k.mT * scale
    if head_scale is not None:
        scores = scores * head_scale.float()[:, None, None]
    scores = scores.unflatten(0, (-1, constant.shape[0]))
    return q, k, v, (scores + constant[..., : q.shape[2]].float()).flatten(0, 1)


def _torch_forward(qkv: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    _, _, v, scores = _scores(qkv, *rest)
    *_, window, shift, _ = rest
    out = reference.merge((scores.softmax(-1) @ v).transpose(1, 2), (qkv.shape[1], qkv.shape[2]), window, shift)
    return out.to(qkv.dtype).contiguous(), scores.logsumexp(-1) * math.log2(math.e)


def _torch_backward(
    dout: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, qkv: torch.Tensor, *rest: Any
) -> torch.Tensor:
    q, k, v, scores = _scores(qkv, *rest)
    _, head_scale, pad, window, shift, scale = rest
    p = (scores - (lse / math.log2(math.e))[..., None]).exp()
    out, dout = (reference.partition(x, window, shift).float().transpose(1, 2) for x in (out, dout))
    ds = p * (dout @ v.mT - (out * dout).sum(-1, keepdim=True)) * scale
    if head_scale is not None:
        ds = ds * head_scale.float()[:, None, None]
    dq, dk, dv = ds @ k, ds.mT @ q, p.mT @ dout
    if head_scale is not None:
        raw = reference.partition(qkv, window, shift, pad).float().permute(2, 0, 3, 1, 4)
        norms = raw[:2].norm(dim=-1, keepdim=True)
        # a token below 1e-12 is divided by a constant, and has no radial part
        dq, dk = (
            (dx - torch.where(norm > 1e-12, x * (x * dx).sum(-1, keepdim=True), 0.0)) / norm.clamp(min=1e-12)
            for dx, x, norm in zip((dq, dk), (q, k), norms, strict=True)
        )
    dqkv = torch.stack([dq, dk, dv]).permute(1, 3, 0, 2, 4)
    return reference.merge(dqkv, (qkv.shape[1], qkv.shape[2]), window, shift).to(qkv.dtype).contiguous()


def _runs_triton(qkv: torch.Tensor) -> bool:
    """Whether the operators run the Triton kernels, and not the same arithmetic in PyTorch."""
    return INTERPRETED.value or qkv.is_cuda


@torch.library.custom_op("scalekd_ds::window_attention", mutates_args=())
def window_attention(
    qkv: torch.Tensor,
    constant: torch.Tensor,
    head_scale: torch.Tensor | None,
    pad: torch.Tensor | None,
    window_h: int,
    window_w: int,
    shift_h: int,
    shift_w: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention of the kernels; see `api.window_attention` for its arguments.

    Returns:
        The output (B, H, W, N, D), contiguous; and the base-2 logarithm of the sum of exp(scores), (B * n, N, T) in float32,
        which the backward needs.

    Raises:
        ValueError: Arguments that do not fit, or sizes that the kernels do not take.
    """
    window, shift = (window_h, window_w), (shift_h, shift_w)
    check_arguments(qkv, constant, window, shift, head_scale, pad)
    D, T = qkv.shape[5], window_h * window_w
    if not supports(D, T, qkv.dtype):
        raise ValueError(
            f"qkv has head size {D} and dtype {qkv.dtype}, and the window {T} tokens: the kernels take multiples of 8 from "
            f"16 to 64, 16 or 32 bits, and at most {MAX_TOKENS}."
        )
    arguments = (qkv, constant, head_scale, pad, window, shift, scale)
    if _runs_triton(qkv):
        return _triton_forward(*arguments)
    # autocast would run products that are meant to be in float32 in 16 bits
    with torch.autocast(qkv.device.type, enabled=False):
        return _torch_forward(*arguments)


@window_attention.register_fake
def _(
    qkv: torch.Tensor,
    constant: torch.Tensor,
    head_scale: torch.Tensor | None,
    pad: torch.Tensor | None,
    window_h: int,
    window_w: int,
    shift_h: int,
    shift_w: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    B, H, W, _, N, D = qkv.shape
    windows = B * -(-H // window_h) * -(-W // window_w)
    return qkv.new_empty(B, H, W, N, D), qkv.new_empty(windows, N, window_h * window_w, dtype=torch.float32)


@torch.library.custom_op("scalekd_ds::window_attention_backward", mutates_args=())
def window_attention_backward(
    dout: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    qkv: torch.Tensor,
    constant: torch.Tensor,
    head_scale: torch.Tensor | None,
    pad: torch.Tensor | None,
    window_h: int,
    window_w: int,
    shift_h: int,
    shift_w: int,
    scale: float,
) -> torch.Tensor:
    """Gradient of `window_attention`.

    Args:
        dout: (B, H, W, N, D) gradient of its output.
        out: (B, H, W, N, D) that it returned.
        lse: (B * n, N, T) that it returned.
        qkv: (B, H, W, 3, N, D), as it was given.
        constant: As it was given.
        head_scale: As it was given.
        pad: As it was given.
        window_h: As it was given.
        window_w: As it was given.
        shift_h: As it was given.
        shift_w: As it was given.
        scale: As it was given.

    Returns:
        (B, H, W, 3, N, D), contiguous.
    """
    arguments = (constant, head_scale, pad, (window_h, window_w), (shift_h, shift_w), scale)
    if _runs_triton(qkv):
        return _triton_backward(dout, out, lse, qkv, *arguments)
    with torch.autocast(qkv.device.type, enabled=False):
        return _torch_backward(dout, out, lse, qkv, *arguments)


@window_attention_backward.register_fake
def _(
    dout: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    qkv: torch.Tensor,
    constant: torch.Tensor,
    head_scale: torch.Tensor | None,
    pad: torch.Tensor | None,
    window_h: int,
    window_w: int,
    shift_h: int,
    shift_w: int,
    scale: float,
) -> torch.Tensor:
    return qkv.new_empty(qkv.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    qkv, constant, head_scale, pad, *ctx.rest = inputs
    ctx.save_for_backward(*output, qkv, constant, head_scale, pad)


def _backward(ctx: Any, dout: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return window_attention_backward(dout, *ctx.saved_tensors, *ctx.rest), *(None,) * 8


window_attention.register_autograd(_backward, setup_context=_setup_context)
