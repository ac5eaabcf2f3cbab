"""The attention of a projector's queries over the student's map."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from scalekd_ds.inspection.pictures.canvas import blend, enlarge, heat_colours
from scalekd_ds.projector.cross_attention import CrossAttentionProjector, LayerNorm2d


def default_queries(grid: tuple[int, int], count: int = 4) -> list[int]:
    """Numbers of `count` query tokens of a grid (rows, columns), spread along its diagonal."""
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
    """The attention weights of a projector, the mean over its heads.

    Args:
        projector: A projector in eval mode, without windows and not sharded; `unsharded_copy` makes one.
        map_BCHW: (B, student_dim, h, w), the student's map.
        queries: Numbers of the query tokens to show, row by row in the query grid.
        query: (B, P, teacher_dim), the queries of a projector that has no learned one (TPP).

    Returns:
        (B, Q, h, w), where the sum of each (h, w) is 1.

    Raises:
        ValueError: The projector has windows, or neither a learned query nor `query`.
    """
    if projector.windows != (1, 1):
        raise ValueError(f"the projector attends in {projector.windows} windows: only whole grids can be shown.")
    if projector.query is not None:
        query = projector.query.weight[None]
    if query is None:
        raise ValueError("query is missing: this projector has no learned query.")
    chosen_BQD = query.index_select(1, torch.tensor(list(queries), device=query.device))
    q_BQNd = projector.q(F.relu(projector.query_mlp(chosen_BQD))).unflatten(-1, (projector.num_heads, -1))
    k_BSNd = projector.k(projector.keys(map_BCHW)).unflatten(-1, (projector.num_heads, -1))
    q_BQNd = q_BQNd.expand(map_BCHW.shape[0], -1, -1, -1)
    scores = torch.einsum("bqnd,bsnd->bnqs", q_BQNd.float(), k_BSNd.float()) * projector.scale
    return scores.softmax(-1).mean(1).unflatten(-1, projector.key_grid)


def attention_pictures(images_BCHW: torch.Tensor, weights_BQhw: torch.Tensor) -> torch.Tensor:
    """Attention weights as colours over the images.

    Args:
        images_BCHW: (B, 3, H, W) in 0 to 1.
        weights_BQhw: (B, Q, h, w), from `attention_maps`; the colour is the share of the largest weight of each (h, w).

    Returns:
        (B, Q, 3, H, W) in 0 to 1.
    """
    shown = weights_BQhw.float().cpu()
    shown = shown / shown.amax((-2, -1), keepdim=True).clamp(min=1e-30)
    coloured = enlarge(heat_colours(shown), (images_BCHW.shape[-2], images_BCHW.shape[-1]), smooth=True)
    return blend(images_BCHW.float().cpu()[:, None], coloured)


def unsharded_copy(
    projector: CrossAttentionProjector, gather: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.cpu
) -> CrossAttentionProjector:
    """A copy of a projector on the CPU in eval mode, with whole parameters and without the engine's hooks.

    Collective if `gather` is, as it is for parameters that ZeRO-3 shards.

    Args:
        projector: The projector, sharded or not.
        gather: Returns a parameter or buffer whole and on the CPU.
    """
    width = projector.q.in_features
    # the copy is initialised before its parameters are loaded, and that must not change the random numbers of training
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
    state = {name: gather(tensor).float() for name, tensor in nn.Module.state_dict(projector, keep_vars=True).items()}
    copied.load_state_dict(state)
    return copied.eval().requires_grad_(False)
