"""Entry point of the projector's attention: checks its arguments and picks the implementation."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from scalekd_ds.kernels.cross_attention import reference, table
from scalekd_ds.kernels.cross_attention.arguments import check


def implementation(
    device: str,
    architecture: int,
    sizes: tuple[int, int, int],
    shared: bool,
    dtype: torch.dtype,
    measured: dict[str, str],
) -> str:
    """`triton` where the table says that it won for this shape, else `sdpa`.

    Args:
        device: Device type.
        architecture: 90 for sm_90.
        sizes: (D, Q, S).
        shared: The query serves more than one sample.
        dtype: Of q, k and v.
        measured: `table.measured()`.
    """
    if device != "cuda" or measured.get(table.key_of(architecture, *sizes, shared, dtype)) != "triton":
        return "sdpa"
    from scalekd_ds.kernels.cross_attention.ops import supports

    return "triton" if supports(*sizes, dtype) else "sdpa"


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (reference.expand_groups(q, k.shape[0]), k, v))
    if k.device.type != "cpu" or k.dtype not in (torch.bfloat16, torch.float16):
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
    # PyTorch's 16-bit backward on CPUs takes up to three times as long as its float32 one, and errs twice as much
    with torch.autocast("cpu", enabled=False):
        out = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), scale=scale)
    return out.transpose(1, 2).to(k.dtype)


def cap_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Multi-head cross attention of the projector (ScaleKD section 3.1).

    Shapes that the table of measurements knows go to the Triton kernels where these were faster, all others to SDPA;
    `scalekd_ds.kernels.cross_attention.ops.cap_attention` is the kernels' own operator.

    Args:
        q: (G, Q, N, D) queries; group g serves the g-th B/G samples: G is 1 where the batch shares one learned query,
            2 where two views are stacked on the batch, B where each sample has its own.
        k: (B, S, N, D) keys; strided views are fine as long as D is contiguous.
        v: (B, S, N, D) values, likewise.
        scale: Factor of q k^T, the softmax scale folded in.

    Returns:
        (B, Q, N, D), token-major, so that heads join by a view.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit, or a head size that is not contiguous, naming the argument.
    """
    check(q, k, v)
    if k.is_cuda:
        shared = q.shape[0] < k.shape[0]
        sizes = (q.shape[3], q.shape[1], k.shape[1])
        chosen = implementation("cuda", table.architecture_of(k.device), sizes, shared, k.dtype, table.measured())
        if chosen == "triton":
            from scalekd_ds.kernels.cross_attention import ops

            return ops.cap_attention(q, k, v, scale)[0]
    return _sdpa(q, k, v, scale)
