"""The ways to compute the kernels that `kernels.py` measures, on random tensors of a shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import published
import shapes
import torch
import torch.nn.functional as F

from scalekd_ds import kernels
from scalekd_ds.kernels.cross_attention import reference as attention_reference
from scalekd_ds.kernels.cross_attention.api import fused_attention
from scalekd_ds.kernels.window_attention import reference as window_reference
from scalekd_ds.kernels.window_attention.api import attend_in_windows

DIRECTIONS = ("forward", "forward+backward")
# the forward of a variant, and the tensors that get gradients
Variant = tuple[Callable[[], torch.Tensor], list[torch.Tensor]]


def eager_dual_view(spatial: list[torch.Tensor], frequency: list[torch.Tensor], t: torch.Tensor) -> torch.Tensor:
    """The loss in eager PyTorch, written with the identity that dropping the DC term is subtracting the mean.

    Args:
        spatial: (B, P, D) student tokens of the spatial view, one tensor for each stage.
        frequency: (B, P, D) student tokens of the frequency view, one tensor for each stage.
        t: (B, P, D) teacher tokens.

    Returns:
        (stages, 2) losses of both views.
    """
    t = t.float()
    t_unit, v_unit = F.normalize(t, dim=-1), F.normalize(t - t.mean(1, keepdim=True), dim=-1)
    losses = []
    for s, f in zip(spatial, frequency, strict=True):
        s, f = s.float(), f.float()
        u_unit = F.normalize(f - f.mean(1, keepdim=True), dim=-1)
        losses.append(torch.stack([(F.normalize(s, dim=-1) - t_unit).square().sum(), (u_unit - v_unit).square().sum()]))
    return torch.stack(losses) / len(t)


def published_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax(QK^T)V by separate operations, where every image has its own copy of the query."""
    return published.attention(*(x.flatten(2) for x in (q, k, v)), k.shape[2], scale)


def dual_view_calls(
    shape: shapes.DualView, batch: int, dtype: torch.dtype, device: torch.device, compiled: bool
) -> dict[str, Variant]:
    """The variants of the loss by name."""
    h, w = shape.grid

    def tokens() -> torch.Tensor:
        return torch.randn(batch, h * w, shape.channels, device=device).to(dtype)

    spatial, frequency = ([tokens().requires_grad_() for _ in range(shape.stages)] for _ in range(2))
    t, leaves, weights = tokens(), [*spatial, *frequency], [(1.0, 1.0)] * shape.stages
    t_map = t.transpose(1, 2).unflatten(2, (h, w)).contiguous()

    def as_published() -> torch.Tensor:
        losses = [published.spatial_loss(s, t_map, 1.0) for s in spatial]
        return torch.stack(losses + [published.frequency_loss(f, t_map, 1.0, 1) for f in frequency])

    calls = {
        "library": lambda: kernels.dual_view_loss(spatial, frequency, t, None, weights),
        "published": as_published,
        "eager": lambda: eager_dual_view(spatial, frequency, t),
    }
    if compiled:
        compile_once = torch.compile(eager_dual_view, dynamic=False)
        calls["compile"] = lambda: compile_once(spatial, frequency, t)
    return {name: (call, leaves) for name, call in calls.items()}


def attention_calls(
    shape: shapes.Attention, batch: int, dtype: torch.dtype, device: torch.device, compiled: bool
) -> dict[str, Variant]:
    """The variants of the attention by name. Both views are stacked, so the batch is 2 B."""
    stacked = 2 * batch
    groups = 2 if shape.shared else stacked
    scale = 5.0 * shape.head_size**-0.5

    def leaf(*size: int) -> torch.Tensor:
        return torch.randn(*size, shape.heads, shape.head_size, device=device).to(dtype).requires_grad_()

    q, q_each, kv = leaf(groups, shape.queries), leaf(stacked, shape.queries), leaf(stacked, shape.keys, 2)

    def with_kv(attention: Callable[..., torch.Tensor], q: torch.Tensor) -> Variant:
        # split in the call: the backward of a view that was made outside would not run on a capture's stream
        return lambda: attention(q, *kv.unbind(2), scale), [q, kv]

    calls = {
        "library": with_kv(kernels.cap_attention, q),
        "published": with_kv(published_attention, q_each),
        "eager": with_kv(attention_reference.cap_attention, q),
        "sdpa": with_kv(fused_attention, q),
    }
    if compiled:
        calls["compile"] = with_kv(torch.compile(attention_reference.cap_attention, dynamic=False), q)
    if device.type == "cuda":
        # measured besides `library`, which may call SDPA, so that the table of the faster one can be written
        from scalekd_ds.kernels.cross_attention import ops

        if ops.supports(shape.head_size, shape.queries, shape.keys, dtype):
            calls["triton"] = with_kv(lambda *arguments: ops.cap_attention(*arguments)[0], q)
    return calls


def timms_window_attention(
    x: torch.Tensor,
    qkv: torch.Tensor,
    bias: torch.Tensor,
    mask: torch.Tensor,
    window: tuple[int, int],
    shift: tuple[int, int],
) -> torch.Tensor:
    """Window attention in timm's unfused order of operations, without its projections.

    Args:
        x: (B, H, W, C) map, which is rolled and cut before it is projected.
        qkv: (B * n, T, 3, N, D) what the projection gave.
        bias: (N, T, T) position bias.
        mask: (n or 1, T, T) of shifted windows.
        window: (rows, columns) of a window.
        shift: (rows, columns) of the shift.

    Returns:
        (B, H, W, C).
    """
    window_reference.partition(x, window, shift)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    scores = (q * q.shape[-1] ** -0.5) @ k.mT + bias
    if any(shift):
        scores = (scores.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
    out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return window_reference.merge(out, (x.shape[1], x.shape[2]), window, shift)


def window_calls(
    shape: shapes.Windows, batch: int, dtype: torch.dtype, device: torch.device, compiled: bool
) -> dict[str, Variant]:
    """The variants of window attention by name. All but Triton's cut the map before its projection, and merge it after."""
    (H, W), N, D = shape.grid, shape.heads, shape.head_size
    window, shift = (shape.window,) * 2, (shape.window // 2 * shape.shifted,) * 2
    T, scale = shape.window**2, D**-0.5
    x = torch.randn(batch, H, W, N * D, device=device).to(dtype)
    mapped = torch.randn(batch, H, W, 3, N, D, device=device).to(dtype).requires_grad_()
    cut = window_reference.partition(mapped.detach(), window, shift).contiguous().requires_grad_()
    bias = torch.randn(N, T, T, device=device)
    mask = window_reference.mask_of(shape.grid, window, shift, device=device)
    constant = window_reference.constant_of(bias, mask).to(dtype)

    def sdpa() -> torch.Tensor:
        window_reference.partition(x, window, shift)
        out = attend_in_windows(cut, constant, scale).flatten(2)
        return window_reference.merge(out, shape.grid, window, shift)

    def timms() -> torch.Tensor:
        return timms_window_attention(x, cut, bias.to(dtype), mask.to(dtype), window, shift)

    calls: dict[str, Variant] = {
        "library": (lambda: kernels.window_attention(mapped, constant, window, shift, scale), [mapped]),
        "published": (timms, [cut]),
        "eager": (lambda: window_reference.window_attention(mapped, constant, window, shift, scale), [mapped]),
        "sdpa": (sdpa, [cut]),
    }
    if compiled:
        calls["compile"] = (torch.compile(timms, dynamic=False), [cut])
    if device.type == "cuda":
        from scalekd_ds.kernels.window_attention import ops

        if ops.supports(D, T, dtype):
            rest = (constant, None, None, *window, *shift, scale)
            calls["triton"] = (lambda: ops.window_attention(mapped, *rest)[0], [mapped])
    return calls


def calls_in(direction: str, calls: dict[str, Variant]) -> dict[str, Callable[[], Any]]:
    """Variant -> a call of its forward without a graph, or of forward and backward with a random upstream gradient."""
    if direction in ("forward", "update"):
        return {name: torch.no_grad()(call) for name, (call, _) in calls.items()}

    def both(call: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> Callable[[], Any]:
        upstream: list[torch.Tensor] = []

        def run() -> Any:
            out = call()
            # in the first call, where a variant that raises is noted
            if not upstream:
                upstream.append(torch.randn_like(out.detach()))
            return torch.autograd.grad(out, leaves, upstream[0])

        return run

    return {name: both(call, leaves) for name, (call, leaves) in calls.items()}
