"""The verb `inspect`: opens models and images, runs the models, and composes the sheet and the lines to print."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from functools import partial

import torch

from scalekd_ds.config import DataConfig, RunConfig
from scalekd_ds.distiller import ScaleKD
from scalekd_ds.errors import UserError
from scalekd_ds.inspection.frequencies import radial_spectrum
from scalekd_ds.inspection.images import AnyImage, Crop, find_images, readable_images, spread_over_folders, true_class
from scalekd_ds.inspection.inspected_models import (
    InspectedModel,
    ModelOutput,
    ModelSource,
    check_same_classes,
    open_model,
    positions_of,
    wrap_model,
)
from scalekd_ds.inspection.pictures import attention_pictures, blend, enlarge, heat_colours, pca_colours, spectrum
from scalekd_ds.inspection.predictions import correctness, crosstable, order_by_disagreement, top_classes
from scalekd_ds.inspection.projector_attention import projector_attention, restore_distiller
from scalekd_ds.inspection.sheet import PictureColumn, PredictionColumn, Sheet, draw_sheet
from scalekd_ds.models.card import eval_resize_at, read_card
from scalekd_ds.models.preprocessing import Preprocessing
from scalekd_ds.names import escape
from scalekd_ds.teacher import Teacher

# query tokens whose attention is shown
QUERIES = 3


@dataclass
class Models:
    """The models on a sheet.

    Attributes:
        student: The student.
        teacher: The teacher, or None.
        baseline: The student to compare with, or None.
        notes: Lines on what was left out and why.
    """

    student: InspectedModel
    teacher: InspectedModel | None
    baseline: InspectedModel | None
    notes: list[str]

    @property
    def all(self) -> list[InspectedModel]:
        """Student, teacher and baseline, without those that are None."""
        return [m for m in (self.student, self.teacher, self.baseline) if m is not None]


def open_models(args: argparse.Namespace) -> Models:
    """Opens student, teacher and baseline.

    Args:
        args: Arguments of the verb `inspect`.

    Raises:
        UserError: A model that was asked for cannot be opened, or the baseline has other classes.
    """
    student = open_model(args.checkpoint, "student", args.weights, args.size, args.of_run)
    notes: list[str] = []
    teacher = baseline = None
    if args.teacher not in (None, "none"):
        teacher = open_model(args.teacher, "teacher", args.teacher_weights)
    elif args.teacher is None and student.source.cfg is not None and student.source.cfg.teacher != "none":
        try:
            teacher = _teacher_of_run(student.source.cfg)
        except UserError as error:
            notes.append(f"teacher left out: {error} Or name it with --teacher.")
    if args.baseline is not None:
        baseline = open_model(args.baseline, "baseline", args.baseline_weights, args.size)
        if differ := check_same_classes(student, baseline):
            raise UserError(f"{differ}: a baseline must answer in the same classes.")
    if teacher is not None and teacher.num_classes and (differ := check_same_classes(student, teacher)):
        notes.append(f"{differ}: its answers are its own, and not marked")
    return Models(student, teacher, baseline, notes)


def _teacher_of_run(cfg: RunConfig) -> InspectedModel:
    """Opens the teacher of a run.

    Raises:
        UserError: It had random weights, or cannot be built.
    """
    card = read_card(cfg.teacher) if cfg.teacher.endswith(".safetensors") else {}
    if cfg.teacher_weights == "none" and not card:
        raise UserError(f"the run's teacher, {cfg.teacher}, had random weights (teacher_weights none).")
    teacher = Teacher(
        cfg.teacher,
        cfg.teacher_image_size or cfg.data.image_size,
        cfg.teacher_weights,
        features=cfg.distill.features,
        input_size=cfg.teacher_image_size,
        **cfg.teacher_kwargs,
    )
    if not cfg.distill.features:
        # the run distilled logits alone, so this teacher has no targets; its own last maps are shown
        return wrap_model(teacher.model, "teacher", cfg.teacher, ModelSource(None, None, None), card)
    return wrap_model(teacher, "teacher", cfg.teacher, ModelSource(None, None, None), card)


def _validation_crop(student: InspectedModel, size: int | None) -> Crop:
    """The crop of the student's validation images, or one with sides of `size` pixels."""
    card, own = student.card, Preprocessing.of(student.model)
    side = size or card.get("image_size") or (own.size or (224, 224))[0]
    data = DataConfig(image_size=side, eval_resize=eval_resize_at(card, side))
    return Crop(side, data.eval_shorter_side, card.get("interpolation", "bicubic"))


def inspect(args: argparse.Namespace) -> list[str]:
    """Draws the sheet that the arguments of the verb `inspect` describe.

    Args:
        args: Arguments of the verb.

    Returns:
        The lines to print.

    Raises:
        UserError: A model or an image cannot be opened, the models do not fit together, or the PNG cannot be written.
    """
    paths = find_images(args.images)
    models = open_models(args)
    student, lines = models.student, []
    crop = _validation_crop(student, args.size)
    student.network.shapes((crop.side, crop.side))
    truth = partial(true_class, folders=student.folder_names, count=student.num_classes)
    if args.pick == "lost":
        if models.baseline is None:
            raise UserError("--pick lost compares with a baseline: give one as --baseline.")
        compared = [m for m in (student, models.baseline, models.teacher) if m and _comparable(student, m)]
        found = correctness(compared, readable_images(paths, crop), truth)
        if not found:
            raise UserError(
                "--pick lost needs images of known classes: none lies in a folder named as one of the student's."
            )
        lines += [crosstable(found, m.role, i) for i, m in enumerate(compared) if i]
        order = order_by_disagreement(found)
    else:
        order = spread_over_folders(paths, args.count)
    shown: list[tuple[AnyImage, torch.Tensor]] = []
    for item in readable_images(order, crop):
        shown.append(item)
        if len(shown) == args.count:
            break
    if not shown:
        raise UserError(f"none of the {len(paths)} images can be read.")
    pixels = torch.stack([p for _, p in shown])
    classes = [truth(path) for path, _ in shown]
    device = next(student.model.parameters()).device
    outputs = {m.role: m.run(pixels.to(device)) for m in models.all}

    names = [student.classes[c] if c is not None and student.classes else None for c in classes]
    predictions = [
        _prediction_column(student, m, outputs[m.role], classes)
        for m in models.all
        if outputs[m.role].logits is not None
    ]
    sheet = Sheet(
        f"{escape(args.checkpoint)}, {crop.side}x{crop.side} pixels",
        [(name and escape(name), escape(path.name)) for name, (path, _) in zip(names, shown, strict=True)],
        _picture_columns(models, outputs, pixels, (crop.side, crop.side)),
        predictions,
        [(m.role, m.role, *radial_spectrum(spectrum(outputs[m.role].maps))) for m in models.all],
    )
    descriptions = [f"{m.role}: {m.describe()}" for m in models.all]
    lines += [
        f"{column.title}: {sum(bool(row[0][2]) for row in column.rows)} of {len(shown)} shown right"
        for column in predictions
        if all(row[0][2] is not None for row in column.rows)
    ]
    draw_sheet(replace(sheet, notes=[*descriptions, "", *lines, *models.notes]), args.out)
    return [*descriptions, *lines, *models.notes, f"wrote {escape(args.out)}: {len(shown)} of {len(paths)} images"]


def _comparable(student: InspectedModel, other: InspectedModel) -> bool:
    """Whether both models predict the same classes."""
    return other is student or (other.num_classes > 0 and check_same_classes(student, other) is None)


def _prediction_column(
    student: InspectedModel, model: InspectedModel, output: ModelOutput, truths: list[int | None]
) -> PredictionColumn:
    """The predictions of a model, given the true classes of the images as classes of the student."""
    comparable = _comparable(student, model)
    right_outputs = positions_of(student, model) if comparable else ()
    rows = []
    for classes, values, truth in zip(*top_classes(output.answers), truths, strict=True):
        row = []
        for c, value in zip(classes.tolist(), values.tolist(), strict=True):
            names = model.classes or (student.classes if comparable else None)
            right = bool(c == right_outputs[truth]) if comparable and truth is not None else None
            row.append((escape(names[c]) if names else f"class {c}", value, right))
        rows.append(row)
    return PredictionColumn(model.role, rows)


def _shape_text(maps: torch.Tensor) -> str:
    """Shape of maps (B, C, h, w) as `h x w x C`."""
    return f"{maps.shape[-2]}x{maps.shape[-1]} x {maps.shape[1]}"


def _picture_columns(
    models: Models, outputs: dict[str, ModelOutput], pixels: torch.Tensor, size: tuple[int, int]
) -> list[PictureColumn]:
    """The images, the feature maps of all models, and the attention of the projectors, or why it is left out."""
    columns = [PictureColumn("image", pixels)]
    columns += [
        PictureColumn(
            f"{m.role}\nlast map, PCA\n{_shape_text(outputs[m.role].maps)}", pca_colours(outputs[m.role].maps)
        )
        for m in models.all
    ]
    try:
        distiller = _restore_distiller(models, size)
    except UserError as error:
        models.notes.append(f"attention left out: {error}; where the student's last map is strong is shown instead")
        distiller = None
    student_output = outputs["student"].student_output
    if distiller is None or student_output is None:
        return [
            *columns,
            PictureColumn("student\nwhere its last\nmap is strong", _token_norms(outputs["student"].maps, pixels)),
        ]
    attention = projector_attention(distiller, student_output, QUERIES)
    overlaid = attention_pictures(pixels, attention.weights)
    for i, (row, col) in enumerate(attention.queries):
        title = f"CAP of {attention.stage}: what\ntoken {row},{col} of {attention.grid[0]}x{attention.grid[1]}\nis made from"
        columns.append(PictureColumn(title, overlaid[:, i], ((row, col), attention.grid)))
    return columns


def _restore_distiller(models: Models, size: tuple[int, int]) -> ScaleKD | None:
    """The distiller of the student's run with its projectors; None if the student was not distilled in a run.

    Raises:
        UserError: The projectors cannot be restored; the message says why.
    """
    student, teacher = models.student, models.teacher
    cfg, checkpoint = student.source.cfg, student.source.checkpoint
    if cfg is None or checkpoint is None or cfg.teacher == "none":
        return None
    if teacher is None:
        raise UserError("it needs the run's teacher")
    if not isinstance(teacher.network, Teacher):
        raise UserError(f"the teacher ({teacher.title}) is not one that the projectors were made for")
    return restore_distiller(student.network, teacher.network, cfg, checkpoint, size)


def _token_norms(maps: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """The norm of each token as colours over the images, scaled from the least to the largest of each image.

    Args:
        maps: (N, C, h, w).
        pixels: (N, 3, H, W) in 0 to 1.

    Returns:
        (N, 3, H, W) in 0 to 1.
    """
    norms = maps.float().cpu().norm(dim=1)
    low, high = norms.amin((-2, -1), keepdim=True), norms.amax((-2, -1), keepdim=True)
    shares = (norms - low) / (high - low).clamp(min=1e-12)
    return blend(pixels, enlarge(heat_colours(shares), (pixels.shape[-2], pixels.shape[-1]), smooth=True))
