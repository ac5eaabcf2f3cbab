"""Parameters of several layers as one tensor, in few launches; and the batched linear layers that compute with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class _Joined(torch.autograd.Function):
    """Concatenates parameters along their first axis in another type: one operation on a list, forward and backward.

    Each parameter is read once and written once. To cast each and then to concatenate, or the other way round, reads and
    writes it twice, in a launch for each parameter and each layer. What is concatenated is made anew in each call: a
    caller may run two forward passes before a backward pass, which needs the weights of its own.
    """

    @staticmethod
    def forward(
        ctx: Any, dtype: torch.dtype, counts: Sequence[int], *parameters: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.dtype, ctx.lengths = parameters[0].dtype, []
        joined, pieces, rest = [], [], iter(parameters)
        for count in counts:
            group = [next(rest) for _ in range(count)]
            lengths = [len(p) for p in group]
            out = group[0].new_empty((sum(lengths), *group[0].shape[1:]), dtype=dtype)
            joined.append(out)
            ctx.lengths.append(lengths)
            pieces += out.split(lengths)
        torch._foreach_copy_(pieces, list(parameters))
        return tuple(joined)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        pieces = [p for gradient, lengths in zip(gradients, ctx.lengths, strict=True) for p in gradient.split(lengths)]
        if pieces[0].dtype == ctx.dtype:
            return None, None, *pieces
        wide = [torch.empty_like(piece, dtype=ctx.dtype) for piece in pieces]
        torch._foreach_copy_(wide, pieces)
        return None, None, *wide


def joined(groups: Sequence[Sequence[torch.Tensor]], dtype: torch.dtype) -> list[torch.Tensor]:
    """Each group of parameters concatenated along the first axis, in `dtype`; gradients go back in the parameters' own type.

    Args:
        groups: Parameters of one type and device; those of a group differ at most in the length of their first axis.
        dtype: Type of the results.
    """
    if torch.compiler.is_compiling():
        # which casts where the products read
        return [torch.cat([p.to(dtype) for p in group]) for group in groups]
    out: Any = _Joined.apply(dtype, [len(group) for group in groups], *(p for group in groups for p in group))
    return list(out)


class _BatchedLinear(torch.autograd.Function):
    """`baddbmm` whose gradient of the weight comes out in the weight's own layout, which PyTorch's has to be copied to."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        dx = g.bmm(weight) if ctx.needs_input_grad[0] else None
        return dx, g.transpose(1, 2).bmm(x), g.sum(1)


def batched_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """(V, M, in) -> (V, M, out): layer v on x[v], in one batched matrix product in the type of the weights.

    Args:
        x: (V, M, in), of V views.
        weight: (V * out, in), the layers' weights joined.
        bias: (V * out,), joined.
    """
    views = x.shape[0]
    weight, bias, x = weight.unflatten(0, (views, -1)), bias.unflatten(0, (views, -1)), x.to(weight.dtype)
    if torch.compiler.is_compiling():
        return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))
    out: torch.Tensor = _BatchedLinear.apply(x, weight, bias)
    return out
