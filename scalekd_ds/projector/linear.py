"""The projector that CAP is compared with: a 1x1 convolution to the teacher's width, resized to its grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


class LinearProjector(nn.Module):
    """1x1 convolution to the teacher's channels and bilinear resizing to its grid, common in feature distillation.

    Args:
        student_dim: Channels of the student's map.
        teacher_dim: Channels of the teacher's tokens.
        query_grid: (h, w) of the teacher's tokens.
    """

    def __init__(self, student_dim: int, teacher_dim: int, query_grid: tuple[int, int]) -> None:
        super().__init__()
        self.query_grid = query_grid
        self.proj = nn.Conv2d(student_dim, teacher_dim, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, student_dim, h, w) -> (B, P, teacher_dim), row by row."""
        x = self.proj(x)
        if x.shape[-2:] != self.query_grid:
            x = F.interpolate(x, self.query_grid, mode="bilinear", align_corners=False)
        return x.flatten(2).transpose(1, 2)


class LinearPair(nn.Module):
    """The linear projectors of one stage, called like a `ProjectorPair`, whose queries they ignore.

    Args:
        views: One projector for each view, by name.
    """

    def __init__(self, views: dict[str, LinearProjector]) -> None:
        super().__init__()
        self.names = tuple(views)
        for name, projector in views.items():
            self.add_module(name, projector)

    def forward(self, x: torch.Tensor, queries: torch.Tensor | None = None) -> torch.Tensor:
        """(B, student_dim, h, w) -> (V, B, P, teacher_dim), V views."""
        return self.one_by_one(x, ())

    def one_by_one(self, x: torch.Tensor, queries: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """The same as `forward`, (B, student_dim, h, w) -> (V, B, P, teacher_dim); `queries` are not used."""
        return torch.stack([getattr(self, name)(x) for name in self.names])
