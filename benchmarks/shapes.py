"""The shapes of the kernels in the published recipes, and the bytes and FLOP that no implementation can avoid."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DualView:
    """A shape of the dual-view loss.

    Attributes:
        name: Its name in the results.
        grid: (rows, columns) of tokens.
        channels: Channels of a token.
        stages: Stages that share the target.
    """

    name: str
    grid: tuple[int, int]
    channels: int
    stages: int = 1
    operation = "dual_view_loss"

    def sizes(self, batch: int) -> dict[str, Any]:
        """The sizes in a row of the results."""
        return {"batch": batch, "tokens": self.grid[0] * self.grid[1], "channels": self.channels, "stages": self.stages}

    def work(self, batch: int, itemsize: int, direction: str) -> dict[str, int]:
        """The least `bytes` to move, and `flop` of matrix products, of which there are none.

        Forward reads each tensor once. Backward reads it again, and writes the gradients of all but the target.
        """
        reads = 2 * self.stages + 1
        tensor = batch * self.grid[0] * self.grid[1] * self.channels * itemsize
        return {"bytes": tensor * (reads if direction == "forward" else 2 * reads + 2 * self.stages), "flop": 0}


@dataclass(frozen=True)
class Attention:
    """A shape of the attention of one stage, with both views stacked.

    Attributes:
        name: Its name in the results.
        queries: Query tokens.
        keys: Key tokens.
        heads: Attention heads.
        head_size: Channels of a head.
        shared: Whether a view has one learned query for the whole batch.
    """

    name: str
    queries: int
    keys: int
    heads: int
    head_size: int
    shared: bool
    operation = "cap_attention"

    def sizes(self, batch: int) -> dict[str, Any]:
        """The sizes in a row of the results; `batch` counts images, so the kernel gets 2 `batch` samples."""
        names = ("queries", "keys", "heads", "head_size", "shared")
        return {"batch": batch, **{name: getattr(self, name) for name in names}}

    def work(self, batch: int, itemsize: int, direction: str) -> dict[str, int]:
        """The least `bytes` to move, and `flop` of matrix products.

        Forward reads q, k, v and writes y, with 2 products. Backward reads q, k, v, y, dy and writes dq, dk, dv, with 5
        products, since the scores are computed again.
        """
        width = self.heads * self.head_size * itemsize
        q = (2 if self.shared else 2 * batch) * self.queries * width
        y, kv = 2 * batch * self.queries * width, 2 * 2 * batch * self.keys * width
        product = 2 * 2 * batch * self.heads * self.queries * self.keys * self.head_size
        if direction == "forward":
            return {"bytes": q + kv + y, "flop": 2 * product}
        return {"bytes": 3 * q + 3 * kv + 3 * y, "flop": 7 * product}


@dataclass(frozen=True)
class Windows:
    """A shape of the attention in windows of a map, in a frozen Swin.

    Attributes:
        name: Its name in the results.
        grid: (rows, columns) of the map.
        window: Rows, and columns, of a window.
        heads: Attention heads.
        head_size: Channels of a head.
        shifted: Whether the windows are shifted by half of one.
    """

    name: str
    grid: tuple[int, int]
    window: int
    heads: int
    head_size: int = 32
    shifted: bool = False
    operation = "window_attention"

    def sizes(self, batch: int) -> dict[str, Any]:
        """The sizes in a row of the results."""
        names = ("grid", "window", "heads", "head_size", "shifted")
        return {"batch": batch, **{name: getattr(self, name) for name in names}}

    def work(self, batch: int, itemsize: int, direction: str) -> dict[str, int]:
        """The least `bytes` to move, and `flop` of matrix products.

        Forward reads q, k, v and writes y, with 2 products. Backward reads q, k, v, y, dy and writes dq, dk, dv, with 5.
        """
        tokens = batch * self.grid[0] * self.grid[1]
        tensor = tokens * self.heads * self.head_size * itemsize
        product = 2 * tokens * self.window**2 * self.heads * self.head_size
        if direction == "forward":
            return {"bytes": 4 * tensor, "flop": 2 * product}
        return {"bytes": 12 * tensor, "flop": 7 * product}


# the large ones are most of the weights of Swin-L -> ResNet-50, those of its projectors
_LARGE = ((37_748_736,), (37_748_736,), (18_874_368,), (9_437_184,), (2_359_296,))
_BLOCK = ((256, 256, 3, 3), (1024, 256, 1, 1), (256,))


@dataclass(frozen=True)
class Update:
    """A step of LAMB.

    Attributes:
        name: Its name in the results.
        flat: Whether the layers lie in one flat tensor, as in a shard of ZeRO's.
        layers: Shapes of the layers.
    """

    name: str
    flat: bool
    layers: tuple[tuple[int, ...], ...]
    operation = "lamb"
    directions = ("update",)

    def parameters(self) -> int:
        """Elements of all layers."""
        return sum(math.prod(shape) for shape in self.layers)

    def sizes(self, batch: int) -> dict[str, Any]:
        """The sizes in a row of the results; the batch changes nothing."""
        return {"batch": batch, "flat": self.flat, "layers": len(self.layers), "parameters": self.parameters()}

    def work(self, batch: int, itemsize: int, direction: str) -> dict[str, int]:
        """The least `bytes` to move: the gradient is read, moments and weight are read and written, in float32."""
        return {"bytes": 7 * 4 * self.parameters(), "flop": 0}


Shape = DualView | Attention | Windows | Update

ALL: tuple[Shape, ...] = (
    DualView("swin_s", (7, 7), 768),
    DualView("swin_l", (7, 7), 1536),
    DualView("swin_l.both", (7, 7), 1536, 2),
    DualView("beit_l", (16, 16), 1024),
    DualView("beit_l.both", (16, 16), 1024, 2),
    DualView("beit_l.336", (24, 24), 1024),
    # Swin-L -> ResNet-50 and MobileNet
    Attention("swin_l.s3", 196, 196, 16, 48, True),
    Attention("swin_l.s4", 49, 49, 24, 64, False),
    # Swin-L -> Swin-T: head size 32
    Attention("swin_l-swin_t.s3", 196, 196, 24, 32, True),
    Attention("swin_l-swin_t.s4", 49, 49, 48, 32, False),
    # Swin-L -> ViT and Mixer: the student's grid is finer than the teacher's
    Attention("swin_l-deit.s3", 196, 196, 8, 96, True),
    Attention("swin_l-deit.s4", 49, 196, 8, 192, False),
    # Swin-S -> ResNet-50
    Attention("swin_s.s3", 196, 196, 3, 128, True),
    Attention("swin_s.s4", 49, 49, 6, 128, False),
    # BEiT-L/14 -> ResNet-50, ViT-B/14, EVA-02-S at 336 pixels
    Attention("beit_l-resnet50.s3", 256, 196, 8, 128, True),
    Attention("beit_l-resnet50.s4", 256, 49, 8, 128, False),
    Attention("beit_l-vit_b.s3", 256, 256, 8, 128, True),
    Attention("beit_l-vit_b.s4", 256, 256, 8, 128, False),
    Attention("beit_l-eva02_s.s3", 576, 576, 8, 128, True),
    Attention("beit_l-eva02_s.s4", 576, 576, 8, 128, False),
    # the teacher Swin-L at 224 pixels, its blocks with shifted windows and without, and at 384
    Windows("swin_l.w7.1", (56, 56), 7, 6),
    Windows("swin_l.w7.1.shifted", (56, 56), 7, 6, shifted=True),
    Windows("swin_l.w7.2", (28, 28), 7, 12),
    Windows("swin_l.w7.2.shifted", (28, 28), 7, 12, shifted=True),
    Windows("swin_l.w7.3", (14, 14), 7, 24),
    Windows("swin_l.w7.3.shifted", (14, 14), 7, 24, shifted=True),
    Windows("swin_l.w7.4", (7, 7), 7, 48),
    Windows("swin_l.w12.1", (96, 96), 12, 6),
    Windows("swin_l.w12.1.shifted", (96, 96), 12, 6, shifted=True),
    Windows("swin_l.w12.3", (24, 24), 12, 24),
    Windows("swin_l.w12.3.shifted", (24, 24), 12, 24, shifted=True),
    Windows("swin_l.w12.4", (12, 12), 12, 48),
    # without ZeRO, and with
    Update("lamb", False, _LARGE + 50 * _BLOCK),
    Update("lamb.flat", True, _LARGE + 50 * _BLOCK),
    Update("lamb.small", False, 4 * _BLOCK),
)
