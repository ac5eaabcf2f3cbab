"""Where a projector's queries look on the student's map."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from scalekd_ds.inspection.pictures.canvas import blend, enlarge, heat
from scalekd_ds.projector.cross_attention import CrossAttentionProjector, LayerNorm2d


def default_queries(grid: tuple[int, int], count: int = 4) -> list[int]:
    """`count` query tokens of `grid`, spread along its diagonal."""
    h, w = grid
    places = [(i + 0.5) / count for i in range(count)]
    return [int(place * h) * w + int(place * w) for place in places]


@torch.no_grad()
def attention_maps(
    projector: CrossAttentionProjector,
    map_BCHW: torch.Tensor,
    queries: Sequence[int],
    query: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weights of the projector's softmax, mean over its heads.

    Args:
        projector: Whole, in eval mode, without windows. A sharded one is made whole by `own_weights`.
        map_BCHW: (B, student_dim, h, w) student map.
        queries: Which of its P queries, by number, row by row.
        query: (B, P, teacher_dim), where the projector has none of its own (TPP).

    Returns:
        (B, Q, h, w), each (h, w) of sum 1.

    Raises:
        ValueError: A projector with windows, or without a query.
    """
    if projector.windows != (1, 1):
        raise ValueError(f"the projector attends in {projector.windows} windows: only whole grids can be shown.")
    if projector.query is not None:
        query = projector.query.weight[None]
    if query is None:
        raise ValueError("query is missing: this projector has none of its own.")
    picked = query[:, list(queries)]
    q_BQNd = projector.q(F.relu(projector.query_mlp(picked))).unflatten(-1, (projector.num_heads, -1))
    k_BSNd = projector.k(projector.keys(map_BCHW)).unflatten(-1, (projector.num_heads, -1))
    q_BQNd = q_BQNd.expand(map_BCHW.shape[0], -1, -1, -1)
    scores = torch.einsum("bqnd,bsnd->bnqs", q_BQNd.float(), k_BSNd.float()) * projector.scale
    return scores.softmax(-1).mean(1).unflatten(-1, projector.key_grid)


def attention_pictures(images_BCHW: torch.Tensor, weights_BQhw: torch.Tensor) -> torch.Tensor:
    """Weights laid over the images.

    Args:
        images_BCHW: (B, 3, H, W) in 0 to 1.
        weights_BQhw: Of `attention_maps`; each is shown in shares of its largest weight.

    Returns:
        (B, Q, 3, H, W).
    """
    shown = weights_BQhw.float().cpu()
    shown = shown / shown.amax((-2, -1), keepdim=True).clamp(min=1e-30)
    coloured = enlarge(heat(shown), tuple(images_BCHW.shape[-2:]), smooth=True)
    return blend(images_BCHW.float().cpu()[:, None], coloured)


def own_weights(
    projector: CrossAttentionProjector, gathered: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.cpu
) -> CrossAttentionProjector:
    """A copy on the CPU, in eval mode, free of the engine's hooks.

    Args:
        projector: Any, sharded or not.
        gathered: Makes a parameter or buffer whole on the CPU; where ZeRO-3 shards it, that is collective, and so is this.
    """
    width = projector.q.in_features
    # it is initialised before it is overwritten: training must not see its draws
    with torch.random.fork_rng(devices=[]):
        copied = CrossAttentionProjector(
            projector.conv.in_channels,
            width,
            projector.key_grid,
            projector.query_grid,
            projector.num_heads,
            projector.scale * (width // projector.num_heads) ** 0.5,
            learned_query=projector.query is not None,
            norm="layer" if isinstance(projector.norm, LayerNorm2d) else "batch",
            windows=projector.windows,
        )
    state = {name: gathered(tensor).float() for name, tensor in nn.Module.state_dict(projector, keep_vars=True).items()}
    copied.load_state_dict(state)
    return copied.eval().requires_grad_(False)
