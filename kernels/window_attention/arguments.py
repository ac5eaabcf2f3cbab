"""The check of window attention's arguments, which the entry point and the operator share."""

from __future__ import annotations

import torch

from scalekd_ds.kernels.window_attention.reference import Size, padded_size


def check_arguments(
    qkv: torch.Tensor,
    constant: torch.Tensor,
    window: Size,
    shift: Size,
    head_scale: torch.Tensor | None,
    pad: torch.Tensor | None,
) -> None:
    """Raises a ValueError that names the argument where one is not what `api.window_attention` takes."""
    if qkv.dim() != 6 or qkv.shape[3] != 3:
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}: it must be (B, H, W, 3, heads, head size).")
    _, H, W, _, N, D = qkv.shape
    if min(window) < 1 or any(not 0 <= s < w for s, w in zip(shift, window, strict=True)):
        raise ValueError(
            f"window is {tuple(window)} and shift {tuple(shift)}: a shift must be from 0 to the window's size less 1."
        )
    rows, columns = padded_size((H, W), window)
    n, T = (rows // window[0]) * (columns // window[1]), window[0] * window[1]
    if constant.dim() != 4 or constant.shape[0] not in (1, n) or constant.shape[1:3] != (N, T) or constant.shape[3] < T:
        raise ValueError(f"constant has shape {tuple(constant.shape)}: it must be ({n} or 1, {N}, {T}, {T} or more).")
    for name, x, shape in (("head_scale", head_scale, (N,)), ("pad", pad, (3, N, D))):
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: it must be {shape}.")
    for name, x in (("constant", constant), ("head_scale", head_scale), ("pad", pad)):
        if x is not None and x.device != qkv.device:
            raise ValueError(f"{name} is on {x.device}: it must be on qkv's device, {qkv.device}.")
    for name, x in (("qkv", qkv), ("constant", constant)):
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(
                f"{name} has strides {x.stride()}: its last axis must be contiguous, stride 1; .contiguous()?"
            )
