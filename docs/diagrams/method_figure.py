"""The method: how features of a student become tokens that are compared with a frozen teacher's."""

from __future__ import annotations

from collections.abc import Mapping

from canvas import TIMES, arrow, box, picture, rectangle, strands, text, written

DESCRIPTION = (
    "Images go through a frozen teacher and a student. The student's map before its last stage passes two cross attention "
    "projectors, one for each view, and then the teacher's own frozen last stage; the result is compared with the teacher's "
    "last tokens, once as it is and once without its mean over the grid. It is also the query of two more projectors over "
    "the student's last map, which are compared with the same tokens. Logit distillation and cross entropy are added."
)


def draw(shapes: Mapping[str, str]) -> str:
    """The picture as the text of an SVG file; `shapes` is what `traced.trace` returns."""
    svg = picture(890, 650, "ScaleKD: the method, with the shapes of Swin-S to ResNet-50", DESCRIPTION)
    teacher_y, student_y, tpp_y, cap_y = 94, 512, 214, 372

    rectangle(svg, (112, 22, 574, 122), "lane")
    text(svg, (124, 42), "Teacher, Swin-S: frozen, no gradient", 13, "start", "strong")
    rectangle(svg, (112, 466, 574, 112), "lane")
    text(svg, (124, 567), "Student, ResNet-50: trained, and all that remains", 13, "start", "strong")

    # images
    box(svg, (10, 270, 92, 62), "data", "images", (shapes["images"],))
    arrow(svg, [(56, 270), (56, teacher_y), (126, teacher_y)], "from-data")
    arrow(svg, [(56, 332), (56, student_y), (126, student_y)], "from-data")

    # teacher
    box(svg, (126, teacher_y - 27, 118, 54), "teacher", "first stages")
    arrow(svg, [(244, teacher_y), (334, teacher_y)], "from-teacher")
    text(svg, (288, teacher_y - 8), shapes["teacher_before"], kind="muted")
    box(svg, (334, teacher_y - 27, 118, 54), "teacher", "last stage")
    arrow(svg, [(452, teacher_y), (596, teacher_y)], "from-teacher")
    text(svg, (524, teacher_y - 8), f"T: {shapes['teacher_last']}", kind="muted")
    box(svg, (596, teacher_y - 27, 76, 54), "teacher", "head")
    arrow(svg, [(672, teacher_y), (722, teacher_y)], "from-teacher")
    text(svg, (703, teacher_y - 8), shapes["teacher_logits"], kind="muted")

    # student
    box(svg, (126, student_y - 27, 118, 54), "student", "first stages")
    arrow(svg, [(244, student_y), (334, student_y)], "from-student")
    box(svg, (334, student_y - 27, 118, 54), "student", "last stage")
    arrow(svg, [(452, student_y), (596, student_y)], "from-student")
    box(svg, (596, student_y - 27, 76, 54), "student", "head")
    arrow(svg, [(672, student_y), (722, student_y)], "from-student")
    text(svg, (704, student_y + 18), shapes["student_logits"], kind="muted")

    # the map before the last stage: CAP, then the teacher's last stage
    arrow(svg, [(288, student_y), (288, cap_y + 34)], "from-student")
    text(svg, (296, 456), shapes["student_before"], anchor="start", kind="muted")
    box(
        svg,
        (224, cap_y - 34, 128, 68),
        "projector",
        f"CAP {TIMES} 2",
        ("cross attention,", f"{shapes['heads_s3']} heads"),
        stacked=True,
    )
    box(svg, (112, cap_y - 24, 88, 48), "projector", "queries", ("learned",))
    arrow(svg, [(200, cap_y), (224, cap_y)], "spatial")
    strands(svg, [(288, cap_y - 40), (288, tpp_y), (334, tpp_y)])
    text(svg, (276, 290), shapes["projected"], anchor="end", kind="muted")
    arrow(svg, [(393, teacher_y + 27), (393, tpp_y - 30)], "from-teacher", head=False, dashed=True)
    text(svg, (401, 164), "same weights", anchor="start", kind="muted")
    box(svg, (334, tpp_y - 30, 118, 60), "teacher", "last stage", ("(TPP), frozen",))
    text(svg, (393, tpp_y + 50), "gradients reach its input,", kind="muted")
    text(svg, (393, tpp_y + 66), "its weights stay", kind="muted")

    # P: compared, and the queries of the last stage
    strands(svg, [(452, tpp_y), (722, tpp_y)])
    text(svg, (510, tpp_y - 11), f"P: {shapes['P']}", kind="muted")
    strands(svg, [(540, tpp_y + 3), (540, cap_y - 40)])
    text(svg, (552, 290), "as queries", anchor="start", kind="muted")
    arrow(svg, [(540, student_y), (540, cap_y + 34)], "from-student")
    text(svg, (548, 456), shapes["student_last"], anchor="start", kind="muted")
    box(
        svg,
        (474, cap_y - 34, 128, 68),
        "projector",
        f"CAP {TIMES} 2",
        ("cross attention,", f"{shapes['heads_s4']} heads"),
        stacked=True,
    )
    strands(svg, [(608, cap_y), (722, cap_y)])
    text(svg, (652, cap_y - 11), f"R: {shapes['R']}", kind="muted")

    # T goes to both comparisons
    rest = tpp_y - 22
    arrow(svg, [(570, teacher_y), (570, 162), (696, 162), (696, rest), (722, rest)], "from-teacher")
    arrow(svg, [(696, rest), (696, cap_y - 24), (722, cap_y - 24)], "from-teacher", halo=True)
    text(svg, (636, 156), "target", kind="muted")

    # losses
    box(svg, (722, teacher_y - 30, 138, 60), "loss", "logit KD", (f"weight {shapes['kd_weight']}",))
    dfm = ("spatial: as they are", "frequency: without", "the grid's mean")
    box(svg, (722, tpp_y - 42, 138, 84), "loss", "DFM of P and T", dfm)
    box(svg, (722, cap_y - 42, 138, 84), "loss", "DFM of R and T", dfm)
    box(svg, (722, student_y - 30, 138, 60), "loss", "CE with labels", (f"weight {1 - float(shapes['kd_weight']):g}",))
    arrow(svg, [(696, student_y), (696, 456), (874, 456), (874, teacher_y), (860, teacher_y)], "from-student")

    # legend
    for x, kind, words in (
        (24, "spatial", "spatial view"),
        (150, "frequency", "frequency view"),
        (292, "from-teacher", "teacher"),
        (390, "from-student", "student"),
    ):
        arrow(svg, [(x, 602), (x + 26, 602)], kind)
        text(svg, (x + 32, 606), words, anchor="start", kind="muted")
    text(svg, (866, 606), "loss: the sum of the yellow boxes", anchor="end", kind="muted")
    names = "CAP: cross attention projector.  TPP: teacher parameter perception.  DFM: dual-view feature mimicking."
    text(svg, (24, 632), names, anchor="start", kind="muted")
    return written(svg)
