"""The projectors of one stage, which run both views in one pass over the student's map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from scalekd_ds import kernels
from scalekd_ds.projector.convolution import autocast_dtype, patches_of
from scalekd_ds.projector.cross_attention import CrossAttentionProjector, LayerNorm2d


def _cast(layers: Sequence[nn.Module], name: str) -> list[torch.Tensor]:
    """The weight or bias `name` of each layer, cast as autocast would cast all of them joined: half the memory traffic."""
    parameters = [getattr(layer, name) for layer in layers]
    return [p.to(autocast_dtype(p)) for p in parameters]


def _batched_linear(x: torch.Tensor, *layers: list[nn.Linear]) -> torch.Tensor:
    """(V, M, in) -> (V, M, out): applies layer v to x[v], all in one batched matrix product.

    With several lists of V layers, their outputs are concatenated along the last axis.
    """
    weight = torch.cat([torch.stack(_cast(group, "weight")) for group in layers], 1)
    bias = torch.cat([torch.stack(_cast(group, "bias")) for group in layers], 1)
    return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))


def _batch_norm(x: torch.Tensor, norms: list[Any]) -> torch.Tensor:
    """BatchNorm of V views that are concatenated along the channels, each with its own statistics.

    Args:
        x: (B, V * C, h, w) map.
        norms: An nn.BatchNorm2d of each view, with statistics, which PyTorch's types do not know.
    """
    first = norms[0]
    mean, var, weight, bias = (
        torch.cat([getattr(norm, name) for norm in norms]) for name in ("running_mean", "running_var", "weight", "bias")
    )
    x = F.batch_norm(x, mean, var, weight, bias, first.training, first.momentum, first.eps)
    if first.training:
        with torch.no_grad():
            for norm, m, v in zip(norms, mean.chunk(len(norms)), var.chunk(len(norms)), strict=True):
                norm.running_mean.copy_(m)
                norm.running_var.copy_(v)
                norm.num_batches_tracked += 1
    return x


class ProjectorPair(nn.Module):
    """The views of one stage (ScaleKD section 3.1) by one convolution, batched projections and one attention.

    Its parameters are those of one `CrossAttentionProjector` for each view. These are also its reference: `one_by_one`
    runs them separately, `stacked` in one pass, and the results are equal up to rounding.

    Args:
        views: One projector for each view, by name; all of the same shape.
    """

    def __init__(self, views: dict[str, CrossAttentionProjector]) -> None:
        super().__init__()
        self.names = tuple(views)
        for name, projector in views.items():
            self.add_module(name, projector)

    @property
    def views(self) -> list[CrossAttentionProjector]:
        """The projectors, in the order of `names`."""
        return [getattr(self, name) for name in self.names]

    def one_by_one(self, x: torch.Tensor, queries: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """The reference for `forward`: runs each view's projector separately.

        Args:
            x: (B, student_dim, h, w) student map.
            queries: For each view (B, P, teacher_dim), or None where its projector has a learned query.

        Returns:
            (V, B, P, teacher_dim), V views.
        """
        patches = patches_of(x)
        return torch.stack([view(x, query, patches) for view, query in zip(self.views, queries, strict=True)])

    def forward(self, x: torch.Tensor, queries: torch.Tensor | None = None) -> torch.Tensor:
        """Projects a map onto the teacher's grid, once for each view.

        Args:
            x: (B, student_dim, h, w) student map.
            queries: (V, B, P, teacher_dim) from TPP, where the projectors have no learned queries.

        Returns:
            (V, B, P, teacher_dim), V views.
        """
        views = self.views
        # not SyncBatchNorm, which shares its statistics over ranks and is no BatchNorm2d
        can_stack = views[0].windows == (1, 1) and isinstance(views[0].norm, nn.BatchNorm2d | LayerNorm2d)
        # on CPUs, one pass saves nothing and costs copies of the weights
        if len(views) == 1 or not can_stack or x.device.type == "cpu":
            return self.one_by_one(x, [None] * len(views) if queries is None else queries.unbind(0))
        return self.stacked(x, queries)

    if TYPE_CHECKING:
        # nn.Module's own would return Any
        __call__ = forward

    def stacked(self, x: torch.Tensor, queries: torch.Tensor | None = None) -> torch.Tensor:
        """`forward` in one pass for all views, whose projectors must not use windows.

        Args:
            x: (B, student_dim, h, w) student map.
            queries: (V, B, P, teacher_dim) from TPP, where the projectors have no learned queries.

        Returns:
            (V, B, P, teacher_dim), V views.

        Raises:
            ValueError: A map of another grid, or queries that are missing.
        """
        views = self.views
        count, batch, heads = len(views), x.shape[0], views[0].num_heads
        tokens = self._keys(x, views)

        kv = _batched_linear(tokens, [v.k for v in views], [v.v for v in views])
        # (V, B*S, 2 * teacher_dim) -> k and v without a copy, (V*B, S, heads, head size) each
        k, v = kv.unflatten(1, (batch, -1)).flatten(0, 1).unflatten(-1, (2, heads, -1)).unbind(2)

        if queries is None:
            learned = [view.query for view in views if view.query is not None]
            if len(learned) < count:
                raise ValueError("queries is missing: these projectors have no learned ones.")
            queries = torch.stack([query.weight for query in learned])
        else:
            queries = queries.flatten(1, 2)
        q = _batched_linear(F.relu(_batched_linear(queries, [v.query_mlp for v in views])), [v.q for v in views])
        grid = views[0].query_grid
        q = q.reshape(-1, grid[0] * grid[1], heads, q.shape[-1] // heads)

        y = kernels.cap_attention(q, k, v, views[0].scale).flatten(2).unflatten(0, (count, batch)).flatten(1, 2)
        y = _batched_linear(y, [v.out for v in views])
        weight, bias = (torch.stack([getattr(v.out_norm, name) for v in views])[:, None] for name in ("weight", "bias"))
        n = F.layer_norm(y, y.shape[-1:], eps=views[0].out_norm.eps) * weight + bias
        out = n + _batched_linear(F.relu(_batched_linear(n, [v.fc1 for v in views])), [v.fc2 for v in views])
        return out.unflatten(1, (batch, -1))

    def _keys(self, x: torch.Tensor, views: list[CrossAttentionProjector]) -> torch.Tensor:
        """Tokens (V, B*S, student_dim) of all views from one convolution, whose output they are without a copy."""
        if tuple(x.shape[-2:]) != views[0].key_grid:
            raise ValueError(f"x has grid {tuple(x.shape[-2:])}: these projectors were built for {views[0].key_grid}.")
        weight, bias = (torch.cat(_cast([v.conv for v in views], name)) for name in ("weight", "bias"))
        f = F.conv2d(x, weight, bias, padding=1)
        if isinstance(views[0].norm, nn.BatchNorm2d):
            f = _batch_norm(f, [v.norm for v in views])
        else:
            f = torch.cat([v.norm(part) for v, part in zip(views, f.chunk(len(views), 1), strict=True)], 1)
        f = F.relu(f) + torch.cat([v.pos_embed for v in views], 1).to(f.dtype)
        return f.permute(0, 2, 3, 1).flatten(0, 2).unflatten(-1, (len(views), -1)).transpose(0, 1)
