"""The projectors of one stage, which run both views in one pass over the student's map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from scalekd_ds import kernels
from scalekd_ds.projector.convolution import autocast_dtype
from scalekd_ds.projector.cross_attention import CrossAttentionProjector, LayerNorm2d
from scalekd_ds.projector.joined import batched_linear, joined


def _batch_norm(x: torch.Tensor, norms: list[Any], weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """BatchNorm of V views that are concatenated along the channels, each with its own statistics.

    Args:
        x: (B, V * C, h, w) map.
        norms: An nn.BatchNorm2d of each view, with statistics, which PyTorch's types do not know.
        weight: (V * C,), the norms' weights joined.
        bias: (V * C,).
    """
    first = norms[0]
    own = [norm.running_mean for norm in norms] + [norm.running_var for norm in norms]
    statistics = torch.cat(own)
    mean, var = statistics.chunk(2)
    x = F.batch_norm(x, mean, var, weight, bias, first.training, first.momentum, first.eps)
    if first.training:
        with torch.no_grad():
            torch._foreach_copy_(own, list(statistics.chunk(len(own))))
            torch._foreach_add_([norm.num_batches_tracked for norm in norms], 1)
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
        patches = self.views[0].conv.patches(x)
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
        if tuple(x.shape[-2:]) != views[0].key_grid:
            raise ValueError(f"x has grid {tuple(x.shape[-2:])}: these projectors were built for {views[0].key_grid}.")
        count, batch, heads = len(views), x.shape[0], views[0].num_heads
        learned = [view.query.weight for view in views if view.query is not None]
        if queries is None and len(learned) < count:
            raise ValueError("queries is missing: these projectors have no learned ones.")
        weights = self._weights(learned if queries is None else [])
        tokens = self._keys(x, weights)

        kv = batched_linear(tokens, *weights["kv"])
        # (V, B*S, 2 * teacher_dim) -> k and v without a copy, (V*B, S, heads, head size) each
        k, v = kv.unflatten(1, (batch, -1)).flatten(0, 1).unflatten(-1, (2, heads, -1)).unbind(2)

        queries = weights["query"][0].unflatten(0, (count, -1)) if queries is None else queries.flatten(1, 2)
        q = batched_linear(F.relu(batched_linear(queries, *weights["query_mlp"])), *weights["q"])
        grid = views[0].query_grid
        q = q.reshape(-1, grid[0] * grid[1], heads, q.shape[-1] // heads)

        y = kernels.cap_attention(q, k, v, views[0].scale).flatten(2).unflatten(0, (count, batch)).flatten(1, 2)
        y = batched_linear(y, *weights["out"])
        weight, bias = (norm.unflatten(0, (count, 1, -1)) for norm in weights["out_norm"])
        n = F.layer_norm(y, y.shape[-1:], eps=views[0].out_norm.eps) * weight + bias
        out = n + batched_linear(F.relu(batched_linear(n, *weights["fc1"])), *weights["fc2"])
        return out.unflatten(1, (batch, -1))

    def _weights(self, queries: list[torch.Tensor]) -> dict[str, list[torch.Tensor]]:
        """Weight and bias of each layer, of all views joined, as one tensor each: those of the norms in their own type.

        Args:
            queries: Learned queries of all views, (P, teacher_dim) each, or none.
        """
        views: list[Any] = self.views
        layers = {"kv": ("k", "v")} | {name: (name,) for name in ("conv", "query_mlp", "q", "out", "fc1", "fc2")}
        groups = {
            name: [[getattr(getattr(v, part), kind) for v in views for part in parts] for kind in ("weight", "bias")]
            for name, parts in layers.items()
        }
        groups["pos_embed"] = [[v.pos_embed for v in views]]
        if queries:
            groups["query"] = [queries]
        names = ("out_norm", "norm") if isinstance(views[0].norm, nn.BatchNorm2d) else ("out_norm",)
        norms = {
            name: [[getattr(getattr(v, name), kind) for v in views] for kind in ("weight", "bias")] for name in names
        }
        own = views[0].out.weight
        out: dict[str, list[torch.Tensor]] = {}
        for part, dtype in ((groups, autocast_dtype(own)), (norms, own.dtype)):
            tensors = iter(joined([group for layer in part.values() for group in layer], dtype))
            out |= {name: [next(tensors) for _ in layer] for name, layer in part.items()}
        return out

    def _keys(self, x: torch.Tensor, weights: dict[str, list[torch.Tensor]]) -> torch.Tensor:
        """Tokens (V, B*S, student_dim) of all views from one convolution, whose output they are without a copy."""
        views = self.views
        weight, bias = weights["conv"]
        f = F.conv2d(x, weight, bias, padding=1)
        if isinstance(views[0].norm, nn.BatchNorm2d):
            f = _batch_norm(f, [v.norm for v in views], *weights["norm"])
        else:
            f = torch.cat([v.norm(part) for v, part in zip(views, f.chunk(len(views), 1), strict=True)], 1)
        f = F.relu(f) + weights["pos_embed"][0].flatten(0, 1)[None].to(f.dtype)
        return f.permute(0, 2, 3, 1).flatten(0, 2).unflatten(-1, (len(views), -1)).transpose(0, 1)
