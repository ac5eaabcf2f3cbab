"""The pictures of a run at each evaluation: the same few validation images, seen by student and teacher."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import nn

from scalekd_ds.data import EvalLoader
from scalekd_ds.distiller import ScaleKD
from scalekd_ds.engine.gather import gathered
from scalekd_ds.inspection.pictures import (
    attention_maps,
    attention_pictures,
    default_queries,
    enlarge,
    map_of,
    mark,
    own_weights,
    pca_colours,
    sheet,
    spectrum,
    spectrum_pictures,
    unnormalise,
)
from scalekd_ds.models.preprocessing import normalisation_of
from scalekd_ds.projector.cross_attention import CrossAttentionProjector
from scalekd_ds.projector.pair import ProjectorPair
from scalekd_ds.student import Student

# pixels of a picture's shorter side, so that the cells of a 4x4 map can be seen
_SIDE = 160
QUERIES = 4


def images_to_show(loader: EvalLoader, count: int, device: torch.device) -> torch.Tensor:
    """(B, 3, S, S) validation images, normalised, spread evenly over the set and so over its classes; the same on all
    ranks."""
    chosen = np.unique(np.linspace(0, len(loader.source) - 1, count).astype(np.int64))
    # one thread on the CPU: a decoder on the GPU would reserve memory for the largest image
    cfg, cpu = replace(loader.cfg, threads=1, prefetch=1), torch.device("cpu")
    small = EvalLoader(loader.source.select(chosen), cfg, len(chosen), 0, 1, cpu, loader.mean, loader.std)
    batches = iter(small)
    images, _ = next(batches)
    small.close()
    return images.to(device)


def attending_projector(distiller: ScaleKD) -> tuple[str, CrossAttentionProjector] | None:
    """Stage and projector whose attention is shown: the first that has queries of its own; None for linear ones."""
    for stage, pair in distiller.projectors.items():
        if isinstance(pair, ProjectorPair):
            for view in pair.views:
                if view.query is not None and view.windows == (1, 1):
                    return stage, view
    return None


@torch.no_grad()
def draw(distiller: ScaleKD, student: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Pictures (3, H, W) by their names in TensorBoard: `pictures/maps`, `pictures/spectrum`, `pictures/attention`.

    Collective: where ranks hold shards of teacher or projectors, all of them run the same passes. `student` is whole.
    """
    teacher, training = distiller.teacher, student.training
    student.eval()
    try:
        seen = Student(student, taps=distiller.tapped_student.taps)(images)
    finally:
        student.train(training)
    maps = {"student": seen.last}
    attention = None
    if teacher is not None and distiller.projectors:
        tokens = distiller.teacher_targets(images).tokens
        maps = {"teacher": map_of(tokens, teacher.last_output.grid), **maps}
        if found := attending_projector(distiller):
            stage, projector = found
            source = seen.before if stage == "s3" else seen.last
            queries = default_queries(projector.query_grid, QUERIES)
            attention = attention_maps(own_weights(projector, gathered), source.float().cpu(), queries)

    shown = unnormalise(images, *normalisation_of(distiller.student))
    factor = _SIDE / min(shown.shape[-2:])
    size = tuple(round(side * max(1.0, factor)) for side in shown.shape[-2:])
    inputs = enlarge(shown, size)
    colours = [enlarge(pca_colours(values), size) for values in maps.values()]
    pictures = {"pictures/maps": sheet([list(row) for row in zip(inputs, *colours, strict=True)])}
    spectra = spectrum_pictures([spectrum(values) for values in maps.values()])
    pictures["pictures/spectrum"] = sheet([[enlarge(picture, (_SIDE, _SIDE)) for picture in spectra]])
    if attention is not None:
        looks = attention_pictures(inputs, attention)
        grid = projector.query_grid
        looks = [[mark(look, query, grid) for look, query in zip(row, queries, strict=True)] for row in looks]
        pictures["pictures/attention"] = sheet([[image, *row] for image, row in zip(inputs, looks, strict=True)])
    return pictures
