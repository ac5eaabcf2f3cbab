"""Entry point of the projector's attention: checks its arguments and picks the implementation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from scalekd_ds.kernels.cross_attention import reference, table
from scalekd_ds.kernels.cross_attention.arguments import check_arguments

# largest head size whose backward cuDNN has on every GPU; PyTorch 2.11 picks cuDNN above it on Hopper all the same
_CUDNN_HEAD_SIZE = 128


def implementation(
    device: str,
    architecture: int,
    sizes: tuple[int, int, int],
    shared: bool,
    dtype: torch.dtype,
    measured: dict[str, str],
) -> str:
    """`triton` where it was measured to be the faster one for this shape, else `sdpa`, PyTorch's attention.

    Args:
        device: Device type, such as `cuda`.
        architecture: Compute capability of a GPU, 90 for sm_90.
        sizes: (head size, queries, keys).
        shared: Whether a query serves more than one sample.
        dtype: Type of q, k and v.
        measured: The table of measurements, `table.measured()`.
    """
    if device != "cuda" or measured.get(table.key_of(architecture, *sizes, shared, dtype)) != "triton":
        return "sdpa"
    from scalekd_ds.kernels.cross_attention.ops import supports

    return "triton" if supports(*sizes, dtype) else "sdpa"


def _scaled_dot_product(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """PyTorch's attention of (B, N, tokens, D), by cuDNN only where cuDNN also has the backward."""
    if not k.is_cuda or k.shape[3] <= _CUDNN_HEAD_SIZE:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    if torch.compiler.is_compiling():
        # the only way to choose that torch.compile can trace; it takes ten times as long as the one below
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            return F.scaled_dot_product_attention(q, k, v, scale=scale)
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)


def fused_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """`cap_attention` by PyTorch's scaled_dot_product_attention alone.

    Args:
        q: (G, Q, N, D) queries, as in `cap_attention`.
        k: (B, S, N, D) keys.
        v: (B, S, N, D) values.
        scale: Factor of q k^T.

    Returns:
        (B, Q, N, D).
    """
    q, k, v = (x.transpose(1, 2) for x in (reference.expand_groups(q, k.shape[0]), k, v))
    if k.device.type != "cpu" or k.dtype not in (torch.bfloat16, torch.float16):
        return _scaled_dot_product(q, k, v, scale).transpose(1, 2)
    # on CPUs, PyTorch's backward in 16 bits takes up to three times as long as in float32, with twice the error
    with torch.autocast("cpu", enabled=False):
        out = _scaled_dot_product(q.float(), k.float(), v.float(), scale)
    return out.transpose(1, 2).to(k.dtype)


def cap_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Multi-head cross attention of the projector (ScaleKD section 3.1).

    It runs on the Triton kernels for shapes at which they were measured to be faster than SDPA, and on SDPA for all
    others. `scalekd_ds.kernels.cross_attention.ops.cap_attention` is the operator of the kernels alone.

    Args:
        q: (G, Q, N, D) queries: Q queries of N heads of size D. Group g serves the g-th B/G samples: G is 1 where the
            batch shares one learned query, 2 where two views are stacked on the batch, B where each sample has its own.
        k: (B, S, N, D) keys; the last axis must be contiguous, the others may have any strides.
        v: (B, S, N, D) values, with strides as for k.
        scale: Factor of q k^T, in which the softmax scale is included.

    Returns:
        (B, Q, N, D), with tokens before heads, so that heads join without a copy.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit, or a last axis that is not contiguous.
    """
    check_arguments(q, k, v)
    if k.is_cuda:
        shared = q.shape[0] < k.shape[0]
        sizes = (q.shape[3], q.shape[1], k.shape[1])
        name = implementation("cuda", table.architecture_of(k.device), sizes, shared, k.dtype, table.measured())
        if name == "triton":
            from scalekd_ds.kernels.cross_attention import ops

            return ops.cap_attention(q, k, v, scale)[0]
    return fused_attention(q, k, v, scale)
