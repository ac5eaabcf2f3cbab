"""One training step: its parts in order, and who does each."""

from __future__ import annotations

from collections.abc import Mapping

from canvas import TIMES, arrow, box, picture, rectangle, strands, text, written

# the parts of a step, as `scalekd_ds.watching.timing.PARTS` times them and TensorBoard shows them
PARTS = ("data_wait", "teacher", "student", "projectors", "losses", "backward", "optimizer")
DESCRIPTION = (
    "DALI decodes images ahead of the step. The frozen teacher gives targets without gradient. In DeepSpeed's engine the "
    "student and the projectors run, whose tokens pass the teacher's last stage; losses are computed, Triton kernels take "
    "the dual-view loss, and the engine makes the backward pass and the update."
)


def draw(shapes: Mapping[str, str]) -> str:
    """The picture as the text of an SVG file; `shapes` is what `traced.trace` returns."""
    svg = picture(890, 534, "One training step of scalekd_ds, and who does what", DESCRIPTION)
    left, step = 104, 111
    columns = [left + step * number for number in range(len(PARTS))]
    width, centre = 99, 49.5

    lanes = (("DALI", 62, 88), ("timm", 164, 98), ("DeepSpeed", 276, 104), ("kernels", 394, 74))
    about = {
        "DALI": ("data",),
        "timm": ("the teacher,", "outside the", "engine"),
        "DeepSpeed": ("one engine:", "student and", "projectors"),
    }
    about["kernels"] = ("of a GPU",)
    for name, y, height in lanes:
        rectangle(svg, (10, y, 870, height), "lane")
        first = y + height / 2 - 8 * len(about[name]) + 5
        text(svg, (20, first), name, 13.5, "start", "strong")
        for number, line in enumerate(about[name], 1):
            text(svg, (20, first + 16 * number), line, 11.5, "start", "muted")
    for x, part in zip(columns, PARTS, strict=True):
        text(svg, (x + centre, 44), part, 13, kind="strong")
    text(svg, (20, 44), "part", 12, "start", "muted")

    decode, teacher, engine, kernel = 106, 213, 328, 431
    box(svg, (columns[0], decode - 36, width, 72), "data", "batch", ("decode, crop,", "resize, flip"))
    box(
        svg,
        (columns[1], decode - 22, 6 * step - 12, 44),
        "data",
        "meanwhile: the next batches are read, decoded and augmented",
        dashed=True,
    )

    box(svg, (columns[1], teacher - 38, width, 76), "teacher", "targets", (f"T {shapes['teacher_last']}", "logits"))
    box(svg, (columns[3], teacher - 38, width, 76), "teacher", "last stage", ("of the teacher,", "frozen (TPP)"))

    box(svg, (columns[2], engine - 40, width, 80), "student", "student", ("two maps", "and logits"))
    box(svg, (columns[3], engine - 40, width, 80), "projector", f"CAP {TIMES} 4", ("onto the", "teacher's grid"))
    box(svg, (columns[4], engine - 40, width, 80), "loss", "losses", ("CE, logit KD,", f"DFM {TIMES} 4"))
    box(svg, (columns[5], engine - 40, width, 80), "student", "backward", ("gradients,", "over all ranks"))
    box(svg, (columns[6], engine - 40, width, 80), "student", "step", ("clip, update,", "average (EMA)"))

    box(svg, (columns[3], kernel - 26, width, 52), "projector", "attention", ("SDPA or Triton",))
    box(svg, (columns[4], kernel - 26, width, 52), "loss", "dual view", ("Triton",))
    box(svg, (columns[5], kernel - 26, width, 52), "student", "both", ("their backward",))

    # the way of the images and of the targets
    arrow(svg, [(columns[0] + centre, decode + 36), (columns[0] + centre, teacher), (columns[1], teacher)], "from-data")
    arrow(svg, [(columns[0] + centre, teacher), (columns[0] + centre, engine), (columns[2], engine)], "from-data")
    top = 154
    arrow(
        svg,
        [
            (columns[1] + centre, teacher - 38),
            (columns[1] + centre, top),
            (columns[4] + centre, top),
            (columns[4] + centre, engine - 40),
        ],
        "from-teacher",
    )
    arrow(svg, [(columns[2] + width, engine), (columns[3], engine)], "from-student")
    strands(svg, [(columns[3] + 30, engine - 40), (columns[3] + 30, teacher + 38)])
    strands(svg, [(columns[3] + 68, teacher + 38), (columns[3] + 68, engine - 40)])
    strands(svg, [(columns[3] + width, engine), (columns[4], engine)])
    arrow(svg, [(columns[4] + width, engine), (columns[5], engine)], "to-loss")
    arrow(svg, [(columns[5] + width, engine), (columns[6], engine)], "from-student")
    for column in (3, 4, 5):
        arrow(
            svg,
            [(columns[column] + centre, kernel - 26), (columns[column] + centre, engine + 40)],
            "from-data",
            head=False,
            dashed=True,
        )
    notes = (
        "Columns are the parts that TensorBoard shows as system/share_*. On a CPU, PyTorch takes the place of the kernels.",
        "ZeRO shards optimizer, gradients and weights by its stage. The teacher is in no checkpoint and no optimizer.",
    )
    for number, note in enumerate(notes):
        text(svg, (20, 496 + 20 * number), note, 12, "start", "muted")
    return written(svg)
