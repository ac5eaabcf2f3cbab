"""Entry points of window attention: over a map, and over windows that were cut out of it; picks the implementation."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F

from scalekd_ds.kernels.cross_attention.table import architecture_of
from scalekd_ds.kernels.window_attention import reference, table
from scalekd_ds.kernels.window_attention.arguments import check_arguments
from scalekd_ds.kernels.window_attention.reference import Size


def implementation(
    device: str,
    architecture: int,
    head_size: int,
    tokens: int,
    shifted: bool,
    gradient: bool,
    dtype: torch.dtype,
    measured: dict[str, str],
) -> str:
    """`triton` where it was measured to be the faster one for this shape, else `sdpa`, PyTorch's attention.

    Args:
        device: Device type, such as `cuda`.
        architecture: Compute capability of a GPU, 90 for sm_90.
        head_size: Channels of a head.
        tokens: Tokens of a window.
        shifted: Whether windows are shifted.
        gradient: Whether it goes backward too.
        dtype: Type of queries, keys and values.
        measured: The table of measurements, `table.measured()`.
    """
    key = table.key_of(architecture, head_size, tokens, shifted, gradient, dtype)
    if device != "cuda" or measured.get(key) != "triton":
        return "sdpa"
    from scalekd_ds.kernels.window_attention.ops import supports

    return "triton" if supports(head_size, tokens, dtype) else "sdpa"


def takes_maps(
    device: torch.device, head_size: int, tokens: int, shifted: bool, gradient: bool, dtype: torch.dtype
) -> bool:
    """Whether `window_attention` has a kernel for this shape that reads the map itself and was measured to be faster.

    Elsewhere it is better to cut the map into windows before queries, keys and values are projected, which are three times
    as wide, and to call `attend_in_windows`. The arguments are those of `implementation`.
    """
    if device.type != "cuda":
        return False
    arguments = (architecture_of(device), head_size, tokens, shifted, gradient, dtype, table.measured())
    return implementation("cuda", *arguments) == "triton"


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast off on `device`; the meta device, on which models are planned, has none."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def attend_in_windows(
    qkv: torch.Tensor, constant: torch.Tensor, scale: float, head_scale: torch.Tensor | None = None
) -> torch.Tensor:
    """`window_attention` of windows that were cut out before, by PyTorch's scaled_dot_product_attention.

    Args:
        qkv: (B * n, T, 3, N, D) queries, keys and values.
        constant: (n or 1, N, T, at least T), as in `window_attention`. With one for all windows it is not copied.
        scale: As in `window_attention`.
        head_scale: As in `window_attention`.

    Returns:
        (B * n, T, N, D), with tokens before heads, so that heads join without a copy.
    """
    M, T, dtype = qkv.shape[0], qkv.shape[1], qkv.dtype
    # on CPUs, PyTorch's backward in 16 bits takes up to three times as long as in float32, with twice the error
    widened = qkv.device.type == "cpu" and dtype != torch.float64 and qkv.requires_grad and torch.is_grad_enabled()
    with without_autocast(qkv.device):
        if widened:
            qkv = qkv.float()
        if head_scale is not None:
            # both at once: normalised in float32 at least, as autocast does
            unit = F.normalize(qkv[:, :, :2].to(torch.promote_types(dtype, torch.float32)), dim=-1)
            q, k = unit.unbind(2)
            q, k, v = (q * head_scale[:, None]).to(qkv.dtype), k.to(qkv.dtype), qkv[:, :, 2]
        else:
            q, k, v = qkv.unbind(2)
        # rounded also where the products are wider, so that it makes no difference in which type it is held
        constant = constant.to(dtype).to(qkv.dtype)
        if constant.shape[0] > 1:
            # a batch of windows has no stride that repeats them
            constant = constant.expand(M // constant.shape[0], *constant.shape).flatten(0, 1)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=constant[..., :T].expand(M, -1, -1, -1), scale=scale)
        return out.transpose(1, 2).to(dtype)


def window_attention(
    qkv: torch.Tensor,
    constant: torch.Tensor,
    window: Size,
    shift: Size,
    scale: float,
    head_scale: torch.Tensor | None = None,
    pad: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(scale q k^T + constant) v in each window of a map (Swin, section 3.2), gradients to `qkv` alone.

    It runs on the Triton kernels for shapes at which they were measured to be faster than SDPA: they read and write the map,
    without rolled or partitioned copies. All others run on SDPA. `scalekd_ds.kernels.window_attention.ops.window_attention` is
    the operator of the kernels alone.

    Args:
        qkv: (B, H, W, 3, N, D) queries, keys and values; the last axis must be contiguous, the others may have any strides.
        constant: (n or 1, N, T, at least T): what is added to the scores in each of the n windows of a map, row by row, or in
            all of them. `reference.constant_of` makes it of a position bias and a mask.
        window: (rows, columns) of a window, T = rows * columns. Windows that reach beyond the map are filled up.
        shift: (rows, columns) by which the windows are shifted, cyclically.
        scale: Factor of q k^T.
        head_scale: (N,) of cosine attention (Swin v2, section 3.2): queries and keys are normalised first, and the product is
            multiplied by it too. None is plain attention.
        pad: (3, N, D) query, key and value of the tokens that fill up windows; None is zeros. They have no gradient.

    Returns:
        (B, H, W, N, D).

    Raises:
        ValueError: Shapes or devices that do not fit, or a last axis that is not contiguous.
    """
    check_arguments(qkv, constant, window, shift, head_scale, pad)
    T, gradient = window[0] * window[1], qkv.requires_grad and torch.is_grad_enabled()
    if takes_maps(qkv.device, qkv.shape[5], T, any(shift), gradient, qkv.dtype):
        from scalekd_ds.kernels.window_attention import ops

        return ops.window_attention(qkv, constant, head_scale, pad, *window, *shift, scale)[0]
    windows = attend_in_windows(reference.partition(qkv, window, shift, pad), constant, scale, head_scale)
    return reference.merge(windows, (qkv.shape[1], qkv.shape[2]), window, shift)
