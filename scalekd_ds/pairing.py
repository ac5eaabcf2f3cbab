"""The table that says how a student and a teacher are paired."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scalekd_ds.models.build import num_parameters
from scalekd_ds.projector.pair import ProjectorPair
from scalekd_ds.student import StudentOutput

if TYPE_CHECKING:
    from scalekd_ds.distiller import ScaleKD


def pairing_table(distiller: ScaleKD, shapes: StudentOutput) -> str:
    """Student and teacher side by side, as plain text; `shapes` are those of the student's output for one image."""
    s, t = shapes, distiller.teacher
    size = f"{distiller.image_size[0]}x{distiller.image_size[1]}"
    rows = [("", "student", "teacher")]
    rows.append(("model", type(distiller.student).__name__, type(t.model).__name__ if t else "none"))
    rows.append(
        (
            "parameters",
            f"{num_parameters(distiller.student) / 1e6:.2f} M",
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
    if distiller.projectors:
        caps = {stage: pair for stage, pair in distiller.projectors.items() if isinstance(pair, ProjectorPair)}
        heads = ", ".join(f"{stage} {pair.views[0].num_heads}" for stage, pair in caps.items())
        kind = f"heads {heads}" if heads else "linear"
        rows.append(("projectors", f"{num_parameters(distiller.projectors) / 1e6:.2f} M", kind))
    rows.append(("weights", " ".join(f"{n}={w:g}" for n, w in distiller.weights().items()), ""))
    widths = [max(len(row[i]) for row in rows if row[0] != "weights") for i in (0, 1)]
    return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}".rstrip() for a, b, c in rows)
