"""DINOv3's rotary embedding, kept on its device: timm makes it on the CPU and copies it at each call."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3
from torch import nn


class KeptRotaryEmbedding(RotaryEmbeddingDinoV3):
    """The rotary embedding of a frozen model, which holds that of one grid as a buffer; others are made as before.

    timm's own cache serves calls without a shape alone, which models of any size do not make.
    """

    def keep(self, grid: tuple[int, int]) -> None:
        """Makes the embedding of `grid`, (h, w) in patches, and holds it from then on."""
        self.feat_shape: Any = list(grid)
        # a plain None before the first time, which no buffer may replace
        self.__dict__.pop("pos_embed_cached", None)
        # as it comes, like the embeddings that it replaces: timm's `_cache_embed` would round it to the buffer's dtype
        self.register_buffer("pos_embed_cached", self._create_embed(self.feat_shape, no_aug=True), persistent=False)

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> nn.Module:
        module = super()._apply(fn, *args, **kwargs)
        # made anew rather than moved or cast: sines differ in the last bit from device to device
        self.keep(self.feat_shape)
        return module

    def get_embed(self, shape: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(h * w, 2 * head size): sines and cosines of a grid `shape`; None is the grid that is kept."""
        kept = shape is not None and tuple(shape) == tuple(self.feat_shape)
        return super().get_embed(None if kept else shape, *args, **kwargs)


def keep_rotary_embeddings(model: nn.Module) -> None:
    """Lets a frozen model's DINOv3 rotary embedding, if it has one, hold that of the grid that it was built for.

    Numbers and state-dict stay as they are.
    """
    rope: Any = getattr(model, "rope", None)
    embed = getattr(model, "patch_embed", None)
    grid = getattr(embed, "grid_size", None)
    if type(rope) is RotaryEmbeddingDinoV3 and rope.feat_shape is None and grid is not None:
        # its class, and not its methods: a copy or a pickle of the model then has it too
        rope.__class__ = KeptRotaryEmbedding
        rope.keep(grid)
