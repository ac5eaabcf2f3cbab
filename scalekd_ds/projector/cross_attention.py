"""CAP, the cross attention projector: it turns a student map into tokens on the teacher's grid."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from scalekd_ds import kernels
from scalekd_ds.projector.convolution import PatchConv


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of a map (B, C, h, w)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


def _split_windows(x: torch.Tensor, grid: tuple[int, int], windows: tuple[int, int]) -> torch.Tensor:
    """(B, h*w, C) tokens -> (B*rows*columns, tokens of one window, C), windows row by row."""
    (h, w), (rows, columns) = grid, windows
    x = x.reshape(x.shape[0], rows, h // rows, columns, w // columns, x.shape[-1])
    return x.transpose(2, 3).flatten(0, 2).flatten(1, 2)


class CrossAttentionProjector(nn.Module):
    """One view's projector (ScaleKD section 3.1, equations 1 to 3).

        f = ReLU(norm(conv3x3(x))) + pos_embed;  q = ReLU(linear(query))
        y = W_o MHA(W_q q, W_k f, W_v f);  n = LN(y);  out = n + W_2 ReLU(W_1 n)

    There is no residual around the attention, and no dropout.

    Args:
        student_dim: Channels of the student's map.
        teacher_dim: Channels of the teacher's tokens.
        key_grid: (h, w) of the student's map.
        query_grid: (h, w) of the teacher's tokens.
        num_heads: Attention heads; must divide teacher_dim.
        softmax_scale: gamma in softmax(gamma q k^T / sqrt(d)).
        learned_query: True learns one query for all images; False expects a query in each call (TPP).
        norm: Norm after the convolution, `batch` or `layer`.
        windows: (rows, columns) of windows that attention stays within; they must divide both grids. With more than one
            window, tokens come out window by window, as the published code leaves them.

    Raises:
        ValueError: Heads that do not divide the width, a grid that the windows do not divide, an unknown norm.
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        key_grid: tuple[int, int],
        query_grid: tuple[int, int],
        num_heads: int,
        softmax_scale: float = 1.0,
        learned_query: bool = True,
        norm: str = "batch",
        windows: tuple[int, int] = (1, 1),
    ) -> None:
        super().__init__()
        if teacher_dim % num_heads:
            raise ValueError(f"num_heads is {num_heads}: it must divide the teacher's width, {teacher_dim}.")
        if norm not in ("batch", "layer"):
            raise ValueError(f"norm is {norm!r}: it must be 'batch' or 'layer'.")
        for name, grid in (("key_grid", key_grid), ("query_grid", query_grid)):
            if grid[0] % windows[0] or grid[1] % windows[1]:
                raise ValueError(f"windows is {tuple(windows)}: it must divide {name}, {tuple(grid)}.")
        self.key_grid = key_grid[0], key_grid[1]
        self.query_grid = query_grid[0], query_grid[1]
        self.windows = windows[0], windows[1]
        self.num_heads = num_heads
        self.scale = softmax_scale * (teacher_dim // num_heads) ** -0.5

        self.conv = PatchConv(student_dim)
        self.norm: nn.Module = nn.BatchNorm2d(student_dim) if norm == "batch" else LayerNorm2d(student_dim, eps=1e-5)
        self.pos_embed = nn.Parameter(torch.zeros(1, student_dim, *key_grid))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.query = nn.Embedding(query_grid[0] * query_grid[1], teacher_dim) if learned_query else None
        # the published 1x1 convolution over the query's grid, as the linear layer that it is on tokens
        self.query_mlp = nn.Linear(teacher_dim, teacher_dim)
        self.q = nn.Linear(teacher_dim, teacher_dim)
        self.k = nn.Linear(student_dim, teacher_dim)
        self.v = nn.Linear(student_dim, teacher_dim)
        self.out = nn.Linear(teacher_dim, teacher_dim)
        self.out_norm = nn.LayerNorm(teacher_dim)
        self.fc1 = nn.Linear(teacher_dim, 4 * teacher_dim)
        self.fc2 = nn.Linear(4 * teacher_dim, teacher_dim)

    def _split_heads(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """(B, h*w, C) tokens -> (B * windows, tokens of one window, heads, head size)."""
        if self.windows != (1, 1):
            x = _split_windows(x, grid, self.windows)
        return x.unflatten(-1, (self.num_heads, -1))

    def keys(self, x: torch.Tensor, patches: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens (B, h*w, student_dim) of a map (B, student_dim, h, w), from which keys and values are projected.

        They are no copy where the map is in channels-last.

        Raises:
            ValueError: A map of another grid than `key_grid`.
        """
        if tuple(x.shape[-2:]) != self.key_grid:
            raise ValueError(f"x has grid {tuple(x.shape[-2:])}: this projector was built for {self.key_grid}.")
        f = F.relu(self.norm(self.conv(x, patches)))
        # in the map's type: promotion to float32 would double the memory traffic of everything up to k and v
        return (f + self.pos_embed.to(f.dtype)).flatten(2).transpose(1, 2)

    def attend(
        self, x: torch.Tensor, query: torch.Tensor | None = None, patches: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The attention alone, before norm and feed-forward part.

        Args:
            x: (B, student_dim, h, w) student map on `key_grid`.
            query: (B, P, teacher_dim) tokens from TPP, where there is no learned query.
            patches: `conv.patches(x)`, where the caller has them already.

        Returns:
            (B, P, teacher_dim) tokens, as `forward` orders them.

        Raises:
            ValueError: A map of another grid, or a query that is missing or not expected.
        """
        f = self.keys(x, patches)
        if self.query is not None:
            if query is not None:
                raise ValueError("query is given, but this projector has a learned one.")
            # one query for the whole batch: its layers run once, not per image
            query = self.query.weight[None]
        elif query is None:
            raise ValueError("query is missing: this projector has no learned one.")
        q = self._split_heads(self.q(F.relu(self.query_mlp(query))), self.query_grid)
        k, v = self._split_heads(self.k(f), self.key_grid), self._split_heads(self.v(f), self.key_grid)
        if self.windows != (1, 1) and q.shape[0] != k.shape[0]:
            q = q.repeat(x.shape[0], 1, 1, 1)
        y = kernels.cap_attention(q, k, v, self.scale).flatten(2)
        return self.out(y.reshape(x.shape[0], -1, y.shape[-1]))

    def forward(
        self, x: torch.Tensor, query: torch.Tensor | None = None, patches: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Projects a map onto the teacher's grid.

        Args:
            x: (B, student_dim, h, w) student map on `key_grid`.
            query: (B, P, teacher_dim) tokens from TPP, where there is no learned query.
            patches: `conv.patches(x)`, where the caller has them already.

        Returns:
            (B, P, teacher_dim) tokens, row by row, or window by window where there are several windows.

        Raises:
            ValueError: A map of another grid, or a query that is missing or not expected.
        """
        n = self.out_norm(self.attend(x, query, self.conv.patches(x) if patches is None else patches))
        return n + self.fc2(F.relu(self.fc1(n)))

    if TYPE_CHECKING:
        # nn.Module's own would return Any
        __call__ = forward
