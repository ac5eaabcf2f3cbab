"""Swin's and Swin v2's attention in a frozen model: timm's numbers, in fewer passes over memory.

timm gathers its position bias (Swin v2: computes it by an MLP), adds the mask of shifted windows, and rolls, pads and cuts
the map, in every forward pass and each in a step of its own. In a frozen model bias and mask are one constant, and rolling
and cutting are one gather.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import swin_transformer, swin_transformer_v2
from torch import nn

from scalekd_ds.kernels.window_attention import reference
from scalekd_ds.kernels.window_attention.api import attend_in_windows, takes_maps, window_attention, without_autocast

# largest logarithm of a head's scale that Swin v2 takes, as timm computes it
_LARGEST_LOG_SCALE = math.log(1.0 / 0.01)


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The type that a linear layer gives its results in."""
    kind = x.device.type
    # the meta device, on which models are planned, has no autocast
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else x.dtype


def _rebuild(module: Any, _: Any) -> None:
    """After weights were loaded; a function of a module, so that models can be pickled."""
    module.prepare(module.grid, module.shift)


class _Frozen(nn.Module):
    """What both kinds of frozen window attention share; a map (B, H, W, C) takes the place of timm's windows.

    Attributes:
        grid: (rows, columns) of the map that it was prepared for.
        shift: (rows, columns) by which its windows are shifted.
        held: The type that the constant is held in; None is that of the weights.
    """

    # of timm's classes
    num_heads: int
    window_size: tuple[int, int]
    qkv: nn.Linear
    proj: nn.Linear
    attn_drop: nn.Dropout
    proj_drop: nn.Dropout
    # buffers, none of them in the state-dict
    window_constant: torch.Tensor
    window_order: torch.Tensor | None
    window_inverse: torch.Tensor | None

    grid: tuple[int, int]
    shift: tuple[int, int]
    held: torch.dtype | None

    def _bias(self) -> torch.Tensor:
        """(N, T, T) position bias."""
        raise NotImplementedError

    def _first(self) -> torch.Tensor:
        """The parameter whose type is that of the constant."""
        raise NotImplementedError

    def _qkv(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _pad(self) -> torch.Tensor | None:
        """(3 N D,) what `_qkv` gives for a token of zeros."""
        raise NotImplementedError

    def _scales(self) -> tuple[float, torch.Tensor | None]:
        """Factor of q k^T, and that of each head in cosine attention."""
        raise NotImplementedError

    def _whole(self) -> bool:
        """Whether the weights are here: those that DeepSpeed has sharded are empty between forward passes."""
        return all(p.numel() > 0 for p in self.parameters())

    @torch.no_grad()
    def prepare(self, grid: tuple[int, int], shift: tuple[int, int]) -> None:
        """Builds the constant, and the order of tokens in windows, from the weights that it has now."""
        if not self._whole():
            return
        self.grid, self.shift = (grid[0], grid[1]), (shift[0], shift[1])
        window = self.window_size
        first = self._first()
        with without_autocast(first.device):
            mask = reference.mask_of(self.grid, window, self.shift, device=first.device, dtype=first.dtype)
            constant = reference.constant_of(self._bias(), mask)
        order = inverse = None
        if any(self.shift) and reference.padded_size(self.grid, window) == self.grid:
            rows, columns = self.grid
            index = torch.arange(rows * columns, device=first.device).view(1, rows, columns)
            order = reference.partition(index, window, self.shift).flatten()
            inverse = torch.empty_like(order)
            inverse[order] = index.flatten()
        self.register_buffer("window_constant", constant.to(self.held or first.dtype), persistent=False)
        self.register_buffer("window_order", order, persistent=False)
        self.register_buffer("window_inverse", inverse, persistent=False)

    def hold(self, dtype: torch.dtype) -> None:
        """Holds the constant in `dtype`, in which it is used."""
        self.held = dtype
        self.window_constant = self.window_constant.to(dtype)

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> nn.Module:
        before = self._first().dtype
        module = super()._apply(fn, *args, **kwargs)
        dtype = self._first().dtype
        if dtype != before or self.window_constant.dtype != (self.held or dtype):
            # from the weights, rather than rounded twice
            self.prepare(self.grid, self.shift)
        return module

    def takes(self, x: torch.Tensor) -> bool:
        """Whether it was prepared for this map: another size, and dropout of the attention, are left to timm."""
        return tuple(x.shape[1:3]) == self.grid and not (self.training and self.attn_drop.p > 0)

    def _of_map(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        window, shift, dtype = self.window_size, self.shift, _compute_dtype(x)
        heads = (3, self.num_heads, -1)
        scale, head_scale = self._scales()
        gradient = torch.is_grad_enabled() and x.requires_grad
        head_size = self.qkv.out_features // 3 // self.num_heads
        if takes_maps(x.device, head_size, window[0] * window[1], any(shift), gradient, dtype):
            qkv, pad = self._qkv(x).unflatten(-1, heads), self._pad()
            if pad is not None:
                pad = pad.to(qkv.dtype).unflatten(0, heads)
            out = window_attention(qkv, self.window_constant, window, shift, scale, head_scale, pad).flatten(-2)
            return self.proj_drop(self.proj(out))
        order, inverse = self.window_order, self.window_inverse
        # the backward of a gather adds up in any order on GPUs
        if gradient:
            order = inverse = None
        if order is not None:
            # the cast that the projection would make, before the copy
            windows = (
                x.to(dtype).flatten(1, 2).index_select(1, order).unflatten(1, (-1, window[0] * window[1])).flatten(0, 1)
            )
        else:
            windows = reference.partition(x, window, shift, dtype=dtype)
        qkv = self._qkv(windows).unflatten(-1, heads)
        out = self.proj(attend_in_windows(qkv, self.window_constant, scale, head_scale).flatten(-2))
        if inverse is not None:
            merged = out.unflatten(0, (x.shape[0], -1)).flatten(1, 2).index_select(1, inverse).view(*x.shape[:3], -1)
        else:
            merged = reference.merge(out, self.grid, window, shift)
        return self.proj_drop(merged)


class FrozenWindowAttention(_Frozen, swin_transformer.WindowAttention):
    """Swin's."""

    relative_position_bias_table: torch.Tensor
    scale: float

    def _first(self) -> torch.Tensor:
        return self.relative_position_bias_table

    def _bias(self) -> torch.Tensor:
        timms: Any = self
        bias: torch.Tensor = timms._get_rel_pos_bias()
        return bias[0]

    def _qkv(self, x: torch.Tensor) -> torch.Tensor:
        project: Any = self.qkv
        out: torch.Tensor = project(x)
        return out

    def _pad(self) -> torch.Tensor | None:
        return self.qkv.bias

    def _scales(self) -> tuple[float, torch.Tensor | None]:
        return self.scale, None

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Attention of a map (B, H, W, C); or timm's, of windows (B * n, T, C)."""
        return self._of_map(x) if x.dim() == 4 else super().forward(x, mask)


class FrozenWindowAttentionV2(_Frozen, swin_transformer_v2.WindowAttention):
    """Swin v2's, of cosines."""

    window_head_scale: torch.Tensor
    window_qkv_bias: torch.Tensor | None
    logit_scale: torch.Tensor
    relative_coords_table: torch.Tensor
    relative_position_index: torch.Tensor
    cpb_mlp: Any
    q_bias: torch.Tensor | None
    k_bias: torch.Tensor
    v_bias: torch.Tensor

    def _first(self) -> torch.Tensor:
        return self.logit_scale

    def _bias(self) -> torch.Tensor:
        first, _, second = self.cpb_mlp
        dtype = self._first().dtype
        hidden = F.linear(self.relative_coords_table.to(dtype), first.weight.to(dtype), first.bias.to(dtype)).relu()
        table = F.linear(hidden, second.weight.to(dtype)).view(-1, self.num_heads)
        bias = table[self.relative_position_index.flatten()].unflatten(0, self.relative_position_index.shape)
        bias = 16 * torch.sigmoid(bias.permute(2, 0, 1))
        return bias

    @torch.no_grad()
    def prepare(self, grid: tuple[int, int], shift: tuple[int, int]) -> None:
        """Builds what is constant in Swin v2 besides."""
        super().prepare(grid, shift)
        if self._whole():
            head_scale = self.logit_scale.clamp(max=_LARGEST_LOG_SCALE).exp().flatten()
            bias = None if self.q_bias is None else torch.cat((self.q_bias, self.k_bias, self.v_bias))
            self.register_buffer("window_head_scale", head_scale, persistent=False)
            self.register_buffer("window_qkv_bias", bias, persistent=False)

    def _qkv(self, x: torch.Tensor) -> torch.Tensor:
        if self.qkv_bias_separate and self.window_qkv_bias is not None:
            qkv = self.qkv(x)
            return qkv + self.window_qkv_bias.to(qkv.dtype)
        # as timm does: its linear layer has no bias of its own
        return F.linear(x, self.qkv.weight, self.window_qkv_bias)

    def _pad(self) -> torch.Tensor | None:
        return self.window_qkv_bias

    def _scales(self) -> tuple[float, torch.Tensor | None]:
        return 1.0, self.window_head_scale

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Attention of a map (B, H, W, C); or timm's, of windows (B * n, T, C)."""
        return self._of_map(x) if x.dim() == 4 else super().forward(x, mask)


class _FrozenBlock(nn.Module):
    attn: Any
    shift_size: tuple[int, int]
    input_resolution: tuple[int, int]

    def _attn(self, x: torch.Tensor) -> Any:
        # timm's own where the map is another one
        return self.attn(x) if self.attn.takes(x) else super()._attn(x)  # type: ignore[misc]

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        super().set_input_size(*args, **kwargs)  # type: ignore[misc]
        self.attn.prepare(self.input_resolution, self.shift_size)


class FrozenSwinBlock(_FrozenBlock, swin_transformer.SwinTransformerBlock):
    """timm's block, whose attention takes the map as it is."""


class FrozenSwinV2Block(_FrozenBlock, swin_transformer_v2.SwinTransformerV2Block):
    """timm's block, whose attention takes the map as it is."""


# timm's block and attention -> ours
_KINDS: dict[type[nn.Module], tuple[type[nn.Module], type[nn.Module], type[_Frozen]]] = {
    swin_transformer.SwinTransformerBlock: (swin_transformer.WindowAttention, FrozenSwinBlock, FrozenWindowAttention),
    swin_transformer_v2.SwinTransformerV2Block: (
        swin_transformer_v2.WindowAttention,
        FrozenSwinV2Block,
        FrozenWindowAttentionV2,
    ),
}


def _has_hooks(module: nn.Module) -> bool:
    return any(value for name, value in vars(module).items() if name.endswith("_hooks") and "state_dict" not in name)


def _difference(block: Any) -> str | None:
    """How a block of a Swin differs from timm's, or None."""
    kind = next((k for k in _KINDS if type(block) is k), None)
    if kind is None:
        return f"it is a {type(block).__name__}"
    attn: Any = block.attn
    own = _KINDS[kind][0]
    built, window = tuple(getattr(attn, "window_size", ())), tuple(block.window_size)
    if type(attn) is not own:
        return f"its attention is a {type(attn).__name__}"
    if any(_has_hooks(m) for m in attn.modules()):
        return "its attention has hooks"
    if any(
        callable(value) and not isinstance(value, nn.Module | type) for value in vars(attn).values()
    ) or "_attn" in vars(block):
        return "a method of its attention was replaced"
    parts = (attn.qkv, attn.proj, attn.softmax, *getattr(attn, "cpb_mlp", ()))
    if (
        any(type(m) not in (nn.Linear, nn.Softmax, nn.ReLU) for m in parts)
        or len(getattr(attn, "cpb_mlp", (0, 0, 0))) != 3
    ):
        return "its attention has layers of its own"
    if built != window:
        return f"its attention was built for windows of {built} and it has {window}"
    mask = block.attn_mask
    if mask is not None and mask.device.type != "meta":
        rows, columns = block.input_resolution
        ours = reference.mask_of((rows, columns), block.window_size, block.shift_size)
        if mask.shape != ours.shape or not torch.equal(mask.to("cpu", ours.dtype), ours):
            return "its mask is not that of shifted windows"
    elif mask is None and any(block.shift_size) and not block.dynamic_mask:
        return "its mask is missing"
    return None


def fuse_window_attention(model: nn.Module) -> str | None:
    """Lets the blocks of a frozen Swin or Swin v2 run their attention as `kernels.window_attention` does, in place.

    State-dict and modules stay as they are, and numbers too but for the order of sums. Bias and mask are built from the weights
    that the model has now; they follow `load_state_dict`, `to` and `set_input_size`, not a weight that is changed in place.

    Args:
        model: Any model, in its final shape.

    Returns:
        What a user should know, in one line, where some of its blocks are not timm's and keep their own; or None.
    """
    kept: list[tuple[str, str]] = []
    blocks: list[tuple[str, Any]] = [
        (name, m)
        for name, m in model.named_modules()
        # those before a headless teacher's last stage have no weights, and never run
        if any(True for _ in m.parameters()) and isinstance(m, tuple(_KINDS))
    ]
    for name, block in blocks:
        if isinstance(block, _FrozenBlock):
            continue
        if (difference := _difference(block)) is not None:
            kept.append((name, difference))
            continue
        _, block_class, attn_class = _KINDS[type(block)]
        attn: Any = block.attn
        # the class, and not methods: a copy or a pickle of the model then has it too
        attn.__class__ = attn_class
        attn.held = None
        attn.prepare(block.input_resolution, block.shift_size)
        # after the modules within it, which a hook on loading is called after
        attn.register_load_state_dict_post_hook(_rebuild)
        block.__class__ = block_class
    if not kept:
        return None
    name, difference = kept[0]
    return (
        f"{len(kept)} of {len(blocks)} blocks of the teacher ({type(model).__name__}) keep their own, slower attention: {name} "
        f"is not timm's, {difference}."
    )


def hold_window_constants(model: nn.Module, dtype: torch.dtype) -> None:
    """Holds the constants of `fuse_window_attention` in `dtype`, that of the autocast which the model runs under."""
    for module in model.modules():
        if isinstance(module, _Frozen):
            module.hold(dtype)
