"""The projectors of a pair: which student map goes to which of the teacher's grids, and where each takes its queries from."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from scalekd_ds.errors import UserError
from scalekd_ds.projector.cross_attention import CrossAttentionProjector
from scalekd_ds.projector.linear import LinearPair, LinearProjector
from scalekd_ds.projector.pair import ProjectorPair
from scalekd_ds.teacher import Teacher

VIEWS = ("spatial", "frequency")


def build_projectors(
    student_maps: tuple[torch.Tensor, torch.Tensor],
    teacher: Teacher,
    terms: Collection[str],
    tpp: bool,
    heads: dict[str, int | None],
    softmax_scale: float,
    norm: str,
    projector: str,
) -> dict[str, nn.Module]:
    """Builds the projectors of every stage that has a loss term (ScaleKD section 3.1), with random weights.

    Args:
        student_maps: The student's maps (B, C, h, w) before and after its last stage.
        teacher: The teacher, whose tokens before and after its last stage they are brought to.
        terms: The loss terms of features, `VIEW_STAGE`.
        tpp: Whether the tokens of stage n-1 pass through the teacher's last stage.
        heads: Heads of attention by stage; None takes the teacher's there.
        softmax_scale: Factor of the scores.
        norm: `batch` or `layer`, after the convolution.
        projector: `cap` for cross attention, or `linear`.

    Returns:
        The projectors of both views by stage, `s3` for stage n-1 and `s4` for stage n.

    Raises:
        UserError: The pair does not go together.
    """
    before, last = student_maps
    projectors: dict[str, nn.Module] = {}
    stages = {"s3": (before, teacher.last_input), "s4": (last, teacher.last_output)}
    for stage, (student_map, teacher_stage) in stages.items():
        views = [view for view in VIEWS if f"{view}_{stage}" in terms]
        if not views:
            continue
        if teacher_stage is None:
            raise UserError(
                "the teacher was built with features=False, and has no last stage: leave that out, or set "
                "features=False of ScaleKD too."
            )
        _, student_dim, h, w = student_map.shape
        grid = (h, w)
        dim, query_grid = teacher_stage.dim, teacher_stage.grid
        if stage == "s3" and (grid[0] > query_grid[0] * 2 or grid[1] > query_grid[1] * 2):
            raise UserError(
                f"the student's map before its last stage is {grid[0]}x{grid[1]}, more than twice the teacher's "
                f"{query_grid[0]}x{query_grid[1]} there: choose a student with more stages, smaller images, or a "
                "larger --teacher_image_size."
            )
        if projector == "linear":
            linear = {view: LinearProjector(student_dim, dim, query_grid) for view in views}
            projectors[stage] = LinearPair(linear)
            continue
        try:
            projectors[stage] = ProjectorPair(
                {
                    view: CrossAttentionProjector(
                        student_dim,
                        dim,
                        grid,
                        query_grid,
                        heads[stage] or teacher_stage.heads,
                        softmax_scale,
                        # with TPP, a view's tokens of stage n-1 are its queries at the last stage
                        learned_query=stage == "s3" or not tpp or f"{view}_s3" not in terms,
                        norm=norm,
                    )
                    for view in views
                }
            )
        except ValueError as error:
            raise UserError(f"projectors of {stage}: {error}") from None
    return projectors
