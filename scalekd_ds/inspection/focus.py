"""Where the projectors of a checkpoint look: they are read from its shards, and put between its student and teacher."""

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
from scalekd_ds.projector.pair import ProjectorPair
from scalekd_ds.student import Student, StudentOutput
from scalekd_ds.teacher import Teacher

_PREFIX = "projectors."


class Focus(NamedTuple):
    """weights: (B, Q, h, w) attention on the student's map; queries: their (row, column); grid: (rows, columns) of them;
    stage: `s3` or `s4`."""

    weights: torch.Tensor
    queries: list[tuple[int, int]]
    grid: tuple[int, int]
    stage: str


def restore_distiller(
    student: Student, teacher: Teacher, cfg: RunConfig, checkpoint: Path, size: tuple[int, int]
) -> ScaleKD:
    """The student and teacher of a run with the projectors of one of its checkpoints, in eval mode.

    Raises:
        UserError: There are none, or not for these models and this size.
    """
    if not cfg.distill.features or cfg.distill.projector != "cap":
        raise UserError("the run trained without attention projectors")
    distiller = ScaleKD(student, teacher, image_size=size, verbose=False, **vars(cfg.distill))
    saved = saved_weights(checkpoint, read_state(checkpoint)["world_size"], _PREFIX)
    saved |= {k: v for k, v in load_file(checkpoint / BUFFERS).items() if k.startswith(_PREFIX)}
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
def focus_of(distiller: ScaleKD, output: StudentOutput, count: int = 3) -> Focus:
    """Attention of the spatial view for a few of the teacher's tokens, mean over heads.

    Of the last stage, whose queries depend on the image, unless its map is too coarse to show anything.
    """
    pairs = {stage: pair for stage, pair in distiller.projectors.items() if isinstance(pair, ProjectorPair)}
    fine = [stage for stage, pair in pairs.items() if min(pair.views[0].key_grid) >= 4]
    stage = max(fine or pairs)
    pair = pairs[stage]
    projector, view = pair.views[0], pair.names[0]
    numbers = default_queries(projector.query_grid, count)
    query = distiller.project(output)["s3"][view] if projector.query is None else None
    weights = attention_maps(projector, output.before if stage == "s3" else output.last, numbers, query)
    places = [divmod(number, projector.query_grid[1]) for number in numbers]
    return Focus(weights.cpu(), places, projector.query_grid, stage)
