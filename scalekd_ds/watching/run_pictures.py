"""Draws the pictures of a run at each evaluation: maps, spectra and attention of student and teacher on a few images."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import nn

from scalekd_ds.data import EvalLoader
from scalekd_ds.distiller import ScaleKD
from scalekd_ds.engine.gather import gather_to_cpu
from scalekd_ds.inspection.pictures import (
    attention_maps,
    attention_pictures,
    default_queries,
    enlarge,
    mark_cell,
    pca_colours,
    spectrum,
    spectrum_pictures,
    tile,
    tokens_to_map,
    unnormalise,
    unsharded_copy,
)
from scalekd_ds.models.preprocessing import normalisation_of
from scalekd_ds.projector.cross_attention import CrossAttentionProjector
from scalekd_ds.projector.pair import ProjectorPair
from scalekd_ds.student import Student

# least pixels of a picture's shorter side, so that the cells of a 4x4 map can be seen
_SIDE = 160
# query tokens whose attention is shown
QUERIES = 4


def images_to_show(loader: EvalLoader, count: int, device: torch.device) -> torch.Tensor:
    """Validation images for the pictures, spread evenly over the data set and so over its classes.

    Args:
        loader: The validation loader.
        count: Number of images.
        device: Where the images go.

    Returns:
        (B, 3, S, S), normalised; the same images on all ranks. Those that cannot be used are left out, so B may be 0.
    """
    chosen = np.unique(np.linspace(0, len(loader.source) - 1, count).astype(np.int64))
    # decoded by one thread on the CPU, since a decoder on the GPU would reserve memory for the largest image
    cfg, cpu = replace(loader.cfg, threads=1, prefetch=1), torch.device("cpu")
    picture_loader = EvalLoader(loader.source.select(chosen), cfg, len(chosen), 0, 1, cpu, loader.mean, loader.std)
    batches = iter(picture_loader)
    images, labels = next(batches)
    picture_loader.close()
    return images[labels >= 0].to(device)


def attending_projector(distiller: ScaleKD) -> tuple[str, CrossAttentionProjector] | None:
    """The projector whose attention is shown, with its stage: the first that has a learned query and no windows.

    None if there is no such projector, as with linear ones.
    """
    for stage, pair in distiller.projectors.items():
        if isinstance(pair, ProjectorPair):
            for view in pair.views:
                if view.query is not None and view.windows == (1, 1):
                    return stage, view
    return None


@torch.no_grad()
def draw_run_pictures(distiller: ScaleKD, student: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Draws the maps, spectra and attention of student and teacher; nothing of a teacher that is headless.

    Collective: every rank calls it, since ranks may hold shards of the teacher or of the projectors.

    Args:
        distiller: Has the teacher and the projectors, which may be sharded.
        student: The whole student, which may be the moving average.
        images: (B, 3, S, S), normalised for the student.

    Returns:
        Pictures (3, H, W) in 0 to 1 by their names in TensorBoard: `pictures/maps`, `pictures/spectrum` and, if there is a
        projector to show, `pictures/attention`.
    """
    teacher, was_training = distiller.teacher, student.training
    student.eval()
    try:
        output = Student(student, taps=distiller.tapped_student.taps)(images)
    finally:
        student.train(was_training)
    maps = {"student": output.last}
    attention = None
    if teacher is not None and distiller.projectors:
        # a headless teacher takes no images
        if not teacher.headless:
            tokens = distiller.teacher_targets(images).tokens
            maps = {"teacher": tokens_to_map(tokens, teacher.stages[1].grid), **maps}
        if found := attending_projector(distiller):
            stage, projector = found
            student_map = output.before if stage == "s3" else output.last
            queries = default_queries(projector.query_grid, QUERIES)
            attention = attention_maps(unsharded_copy(projector, gather_to_cpu), student_map.float().cpu(), queries)

    shown = unnormalise(images, *normalisation_of(distiller.student))
    factor = _SIDE / min(shown.shape[-2:])
    height, width = (round(side * max(1.0, factor)) for side in shown.shape[-2:])
    size = (height, width)
    inputs = enlarge(shown, size)
    colours = [enlarge(pca_colours(values), size) for values in maps.values()]
    pictures = {"pictures/maps": tile([list(row) for row in zip(inputs, *colours, strict=True)])}
    spectra = spectrum_pictures([spectrum(values) for values in maps.values()])
    pictures["pictures/spectrum"] = tile([[enlarge(picture, (_SIDE, _SIDE)) for picture in spectra]])
    if attention is not None:
        overlaid = attention_pictures(inputs, attention)
        grid = projector.query_grid
        marked = [
            [mark_cell(picture, query, grid) for picture, query in zip(row, queries, strict=True)] for row in overlaid
        ]
        pictures["pictures/attention"] = tile([[image, *row] for image, row in zip(inputs, marked, strict=True)])
    return pictures
