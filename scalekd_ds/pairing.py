"""The table that shows how a student and a teacher are paired."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

from torch import nn

from scalekd_ds.models.build import num_parameters
from scalekd_ds.projector.pair import ProjectorPair
from scalekd_ds.student import StudentOutput
from scalekd_ds.teacher import Teacher


def pairing_table(
    student: nn.Module,
    teacher: Teacher | None,
    shapes: StudentOutput,
    image_size: tuple[int, int],
    projectors: nn.ModuleDict,
    weights: Mapping[str, float],
) -> str:
    """Student and teacher side by side, as a table in plain text.

    Args:
        student: The bare student.
        teacher: The teacher, or None for supervised training.
        shapes: The student's output for one image.
        image_size: (h, w) of the student's images in pixels.
        projectors: A pair of projectors for each stage; empty without feature terms.
        weights: Factor of each loss term, by name.
    """

    def millions(model: nn.Module) -> str:
        return f"{num_parameters(model) / 1e6:.2f} M"

    def grid_and_channels(grid: tuple[int, ...], dim: int) -> str:
        return f"{grid[0]}x{grid[1]} x {dim}"

    t = teacher
    rows = [("", "student", "teacher")]
    alone = (", its last stage alone" if t.last_input else ", its logits alone") if t and t.headless else ""
    rows.append(("model", type(student).__name__, t.title + alone if t else "none"))
    rows.append(("parameters", millions(student), millions(t) if t else ""))
    t_size = (t.preprocessing.size or image_size) if t else image_size
    rows.append(("image", f"{image_size[0]}x{image_size[1]}", f"{t_size[0]}x{t_size[1]}" if t else ""))
    rows.append(("classes", str(shapes.logits.shape[-1]), str(t.num_classes) if t else ""))
    for label, student_map, stage in (
        ("before last stage", shapes.before, t and t.last_input),
        ("last stage", shapes.last, t and t.last_output),
    ):
        teacher_cell = f"{grid_and_channels(stage.grid, stage.dim)}, {stage.heads} heads" if stage else ""
        rows.append((label, grid_and_channels(student_map.shape[-2:], student_map.shape[1]), teacher_cell))
    if t and t.headless:
        rows.append(("targets", "", "from a teacher cache"))
    if projectors:
        attention = {stage: pair for stage, pair in projectors.items() if isinstance(pair, ProjectorPair)}
        heads = ", ".join(f"{stage} {pair.views[0].num_heads}" for stage, pair in attention.items())
        rows.append(("projectors", millions(projectors), f"heads {heads}" if heads else "linear"))
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    # they are long, and must neither push the teacher's column to the right nor be broken by a terminal of 80 columns
    terms = textwrap.wrap(" ".join(f"{n}={w:g}" for n, w in weights.items()), 78 - widths[0], break_on_hyphens=False)
    rows += [("" if i else "weights", line, "") for i, line in enumerate(terms)]
    return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}".rstrip() for a, b, c in rows)
