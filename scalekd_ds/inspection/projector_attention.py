"""The attention of a checkpoint's projectors, which are read from its shards and put between its student and teacher."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file

from scalekd_ds.checkpoint.layout import BUFFERS, read_state
from scalekd_ds.checkpoint.shard_files import saved_weights
from scalekd_ds.config import RunConfig
from scalekd_ds.distiller import ScaleKD
from scalekd_ds.errors import UserError
from scalekd_ds.inspection.pictures import attention_maps, default_queries
from scalekd_ds.names import utf8_path
from scalekd_ds.projector.pair import ProjectorPair
from scalekd_ds.student import Student, StudentOutput
from scalekd_ds.teacher import Teacher

_PREFIX = "projectors."


class ProjectorAttention(NamedTuple):
    """Attention of a projector for a few query tokens.

    Attributes:
        weights: (B, Q, h, w), the attention of each query over the student's map.
        queries: (row, column) of each query token.
        grid: (rows, columns) of all query tokens.
        stage: The projector's stage, `s3` or `s4`.
    """

    weights: torch.Tensor
    queries: list[tuple[int, int]]
    grid: tuple[int, int]
    stage: str


def restore_distiller(
    student: Student, teacher: Teacher, cfg: RunConfig, checkpoint: Path, size: tuple[int, int]
) -> ScaleKD:
    """The distiller of a run in eval mode, with the projectors of one of its checkpoints.

    Args:
        student: The run's student.
        teacher: The run's teacher.
        cfg: The run.
        checkpoint: The checkpoint's folder.
        size: (H, W) of the images in pixels.

    Raises:
        UserError: The checkpoint has no attention projectors, or they are for other models or another size.
    """
    if not cfg.distill.features or cfg.distill.projector != "cap":
        raise UserError("the run trained without attention projectors")
    distiller = ScaleKD(student, teacher, image_size=size, verbose=False, **vars(cfg.distill))
    saved = saved_weights(checkpoint, read_state(checkpoint)["world_size"], _PREFIX)
    with utf8_path(checkpoint / BUFFERS) as path:
        buffers = load_file(path)
    saved |= {k: v for k, v in buffers.items() if k.startswith(_PREFIX)}
    own = {k: v for k, v in distiller.state_dict().items() if k.startswith(_PREFIX)}
    if not saved:
        raise UserError("the checkpoint holds no projectors")
    wrong = [k for k in own if k not in saved or saved[k].numel() != own[k].numel()]
    if wrong or len(saved) != len(own):
        raise UserError(
            f"the checkpoint's projectors are of another student, teacher or size ({(wrong or ['more'])[0]})"
        )
    state = {k.removeprefix(_PREFIX): saved[k].reshape(own[k].shape) for k in own}
    distiller.projectors.load_state_dict(state)
    return distiller.to(next(student.parameters()).device).eval()


@torch.no_grad()
def projector_attention(distiller: ScaleKD, output: StudentOutput, count: int = 3) -> ProjectorAttention:
    """Attention of the spatial view's projector for a few query tokens, the mean over its heads.

    The last stage is taken, whose queries depend on the image, unless its map is smaller than 4x4 and another stage's is not.

    Args:
        distiller: From `restore_distiller`.
        output: The student's output for the images.
        count: Number of query tokens.
    """
    pairs = {stage: pair for stage, pair in distiller.projectors.items() if isinstance(pair, ProjectorPair)}
    fine_stages = [stage for stage, pair in pairs.items() if min(pair.views[0].key_grid) >= 4]
    stage = max(fine_stages or pairs)
    pair = pairs[stage]
    projector, view = pair.views[0], pair.names[0]
    tokens = default_queries(projector.query_grid, count)
    query = distiller.project(output)["s3"][view] if projector.query is None else None
    weights = attention_maps(projector, output.before if stage == "s3" else output.last, tokens, query)
    positions = [divmod(token, projector.query_grid[1]) for token in tokens]
    return ProjectorAttention(weights.cpu(), positions, projector.query_grid, stage)
