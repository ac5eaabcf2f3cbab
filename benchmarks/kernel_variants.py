"""The ways to compute the two kernels that `kernels.py` measures, on random tensors of a shape."""

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


def calls_in(direction: str, calls: dict[str, Variant]) -> dict[str, Callable[[], Any]]:
    """Variant -> a call of its forward without a graph, or of forward and backward with a random upstream gradient."""
    if direction == "forward":
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
