"""The table that says how a student and a teacher are paired."""

from __future__ import annotations

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
    """Student and teacher side by side, as plain text.

    Args:
        student: The bare student.
        teacher: Or None for supervised training.
        shapes: Of the student's output for one image.
        image_size: (h, w) in pixels, of the student's images.
        projectors: By stage; empty without feature terms.
        weights: Factor of each loss term, by name.
    """
    s, t = shapes, teacher
    size = f"{image_size[0]}x{image_size[1]}"
    rows = [("", "student", "teacher")]
    rows.append(("model", type(student).__name__, type(t.model).__name__ if t else "none"))
    rows.append(
        (
            "parameters",
            f"{num_parameters(student) / 1e6:.2f} M",
            f"{num_parameters(t) / 1e6:.2f} M" if t else "",
        )
    )
    t_size = t.preprocessing.size if t else None
    rows.append(("image", size, (f"{t_size[0]}x{t_size[1]}" if t_size else size) if t else ""))
    rows.append(("classes", str(s.logits.shape[-1]), str(t.num_classes) if t else ""))

    def shown(grid: tuple[int, ...], dim: int) -> str:
        return f"{grid[0]}x{grid[1]} x {dim}"

    for label, tap, place in (
        ("before last stage", s.before, t and t.last_input),
        ("last stage", s.last, t and t.last_output),
    ):
        theirs = f"{shown(place.grid, place.dim)}, {place.heads} heads" if place else ""
        rows.append((label, shown(tap.shape[-2:], tap.shape[1]), theirs))
    if projectors:
        caps = {stage: pair for stage, pair in projectors.items() if isinstance(pair, ProjectorPair)}
        heads = ", ".join(f"{stage} {pair.views[0].num_heads}" for stage, pair in caps.items())
        kind = f"heads {heads}" if heads else "linear"
        rows.append(("projectors", f"{num_parameters(projectors) / 1e6:.2f} M", kind))
    rows.append(("weights", " ".join(f"{n}={w:g}" for n, w in weights.items()), ""))
    widths = [max(len(row[i]) for row in rows if row[0] != "weights") for i in (0, 1)]
    return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}".rstrip() for a, b, c in rows)
