"""From the arguments of `inspect` to the sheet: models, images, what each shows, and what is said about it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from scalekd_ds.config import DataConfig
from scalekd_ds.distiller import ScaleKD
from scalekd_ds.errors import UserError
from scalekd_ds.inspection.answers import answers, crosstable, is_right, most_telling, top
from scalekd_ds.inspection.focus import focus_of, restore_distiller
from scalekd_ds.inspection.frequencies import radial
from scalekd_ds.inspection.pictured import Cut, find_images, readable, spread, true_class
from scalekd_ds.inspection.pictures import attention_pictures, blend, enlarge, heat, pca_colours, spectrum
from scalekd_ds.inspection.sheet import Answers, Pictures, Sheet, draw
from scalekd_ds.inspection.subjects import Located, Seen, Subject, check_same_classes, open_subject, subject_of
from scalekd_ds.models.card import read_card
from scalekd_ds.models.preprocessing import Preprocessing
from scalekd_ds.teacher import Teacher

QUERIES = 3


@dataclass
class Models:
    """Who is on the sheet, and lines on who is not and why."""

    student: Subject
    teacher: Subject | None
    baseline: Subject | None
    notes: list[str]

    @property
    def all(self) -> list[Subject]:
        return [s for s in (self.student, self.teacher, self.baseline) if s is not None]


def open_models(args: argparse.Namespace) -> Models:
    """Student, teacher and baseline.

    Raises:
        UserError: One that was asked for cannot be had, or a baseline of other classes.
    """
    student = open_subject(args.checkpoint, "student", args.weights, args.size, args.of_run)
    notes: list[str] = []
    teacher = baseline = None
    if args.teacher not in (None, "none"):
        teacher = open_subject(args.teacher, "teacher", args.teacher_weights)
    elif args.teacher is None and student.located.cfg is not None and student.located.cfg.teacher != "none":
        try:
            teacher = _teacher_of_run(student)
        except UserError as error:
            notes.append(f"teacher left out: {error} Or name it with --teacher.")
    if args.baseline is not None:
        baseline = open_subject(args.baseline, "baseline", args.baseline_weights, args.size)
        if differ := check_same_classes(student, baseline):
            raise UserError(f"{differ}: a baseline must answer in the same classes.")
    if teacher is not None and teacher.num_classes and (differ := check_same_classes(student, teacher)):
        notes.append(f"{differ}: its answers are its own, and not marked")
    return Models(student, teacher, baseline, notes)


def _teacher_of_run(student: Subject) -> Subject:
    cfg = student.located.cfg
    facts = read_card(cfg.teacher) if cfg.teacher.endswith(".safetensors") else {}
    if cfg.teacher_weights == "none" and not facts:
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
        # logits alone were distilled; its maps are worth a look all the same
        return subject_of(teacher.model, "teacher", cfg.teacher, Located(None, None, None), facts)
    return subject_of(teacher, "teacher", cfg.teacher, Located(None, None, None), facts)


def _cut(student: Subject, size: int | None) -> Cut:
    """As the student's validation images are cut."""
    facts, own = student.facts, Preprocessing.of(student.model)
    side = size or facts.get("image_size") or (own.size or (224, 224))[0]
    data = DataConfig(image_size=side, eval_resize=facts.get("eval_resize") if size is None else None)
    return Cut(side, data.eval_shorter_side, facts.get("interpolation", "bicubic"))


def inspect(args: argparse.Namespace) -> list[str]:
    """Draws the sheet that the arguments of `commands.inspect` ask for; returns the lines to print.

    Raises:
        UserError: Models or images that cannot be had, or do not go together.
    """
    paths = find_images(args.images)
    models = open_models(args)
    student, lines = models.student, []
    cut = _cut(student, args.size)
    student.network.shapes((cut.side, cut.side))
    truth = partial(true_class, folders=student.folders)
    if args.pick == "lost":
        if models.baseline is None:
            raise UserError("--pick lost compares with a baseline: give one as --baseline.")
        judged = [s for s in (student, models.baseline, models.teacher) if s and _comparable(student, s)]
        found = answers(judged, readable(paths, cut), truth)
        if not found:
            raise UserError(
                "--pick lost needs images of known classes: none lies in a folder named as one of the student's."
            )
        lines += [crosstable(found, s.role, i) for i, s in enumerate(judged) if i]
        order = most_telling(found)
    else:
        order = spread(paths, args.count)
    shown: list[tuple[Path, torch.Tensor]] = []
    for item in readable(order, cut):
        shown.append(item)
        if len(shown) == args.count:
            break
    if not shown:
        raise UserError(f"none of the {len(paths)} images can be read.")
    pixels = torch.stack([p for _, p in shown])
    classes = [truth(path) for path, _ in shown]
    device = next(student.model.parameters()).device
    seen = {s.role: s.see(pixels.to(device)) for s in models.all}

    names = [student.classes[c] if c is not None and student.classes else None for c in classes]
    told = [_answers(student, s, seen[s.role], classes) for s in models.all if seen[s.role].logits is not None]
    sheet = Sheet(
        f"{args.checkpoint}, {cut.side}x{cut.side} pixels",
        [(name, path.name) for name, (path, _) in zip(names, shown, strict=True)],
        _pictures(models, seen, pixels, (cut.side, cut.side)),
        told,
        [(s.role, s.role, *radial(spectrum(seen[s.role].maps))) for s in models.all],
    )
    about = [f"{s.role}: {s.about()}" for s in models.all]
    lines += [
        f"{a.title}: {sum(bool(row[0][2]) for row in a.rows)} of {len(shown)} shown right"
        for a in told
        if all(row[0][2] is not None for row in a.rows)
    ]
    draw(replace(sheet, notes=[*about, "", *lines, *models.notes]), args.out)
    return [*about, *lines, *models.notes, f"wrote {args.out}: {len(shown)} of {len(paths)} images"]


def _comparable(student: Subject, other: Subject) -> bool:
    return other is student or (other.num_classes > 0 and check_same_classes(student, other) is None)


def _answers(student: Subject, subject: Subject, seen: Seen, truths: list[int | None]) -> Answers:
    comparable = _comparable(student, subject)
    rows = []
    for classes, values, truth in zip(*top(seen.logits), truths, strict=True):
        row = []
        for c, value in zip(classes.tolist(), values.tolist(), strict=True):
            name = subject.classes or (student.classes if comparable else None)
            right = is_right(student, subject, c, truth) if comparable and truth is not None else None
            row.append((name[c] if name else f"class {c}", value, right))
        rows.append(row)
    return Answers(subject.role, rows)


def _grid(maps: torch.Tensor) -> str:
    return f"{maps.shape[-2]}x{maps.shape[-1]} x {maps.shape[1]}"


def _pictures(models: Models, seen: dict[str, Seen], pixels: torch.Tensor, size: tuple[int, int]) -> list[Pictures]:
    columns = [Pictures("image", pixels)]
    columns += [
        Pictures(f"{s.role}\nlast map, PCA\n{_grid(seen[s.role].maps)}", pca_colours(seen[s.role].maps))
        for s in models.all
    ]
    try:
        distiller = _distiller(models, size)
    except UserError as error:
        models.notes.append(f"attention left out: {error}; where the student's last map is strong is shown instead")
        distiller = None
    if distiller is None:
        return [*columns, Pictures("student\nwhere its last\nmap is strong", _energy(seen["student"].maps, pixels))]
    focus = focus_of(distiller, seen["student"].output, QUERIES)
    overlaid = attention_pictures(pixels, focus.weights)
    for i, (row, col) in enumerate(focus.queries):
        title = f"CAP of {focus.stage}: what\ntoken {row},{col} of {focus.grid[0]}x{focus.grid[1]}\nis made from"
        columns.append(Pictures(title, overlaid[:, i], ((row, col), focus.grid)))
    return columns


def _distiller(models: Models, size: tuple[int, int]) -> ScaleKD | None:
    """The run's projectors in place; None for a model that is of no distillation.

    Raises:
        UserError: Why they cannot be had.
    """
    student, teacher = models.student, models.teacher
    cfg, checkpoint = student.located.cfg, student.located.checkpoint
    if cfg is None or cfg.teacher == "none":
        return None
    if teacher is None:
        raise UserError("it needs the run's teacher")
    if not isinstance(teacher.network, Teacher):
        raise UserError(f"the teacher ({teacher.title}) is not one that the projectors were made for")
    return restore_distiller(student.network, teacher.network, cfg, checkpoint, size)


def _energy(maps: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """(N, 3, H, W): length of each token over the image, from the smallest to the largest of that image."""
    norms = maps.float().cpu().norm(dim=1)
    low, high = norms.amin((-2, -1), keepdim=True), norms.amax((-2, -1), keepdim=True)
    shares = (norms - low) / (high - low).clamp(min=1e-12)
    return blend(pixels, enlarge(heat(shares), tuple(pixels.shape[-2:]), smooth=True))
