"""Pairs by name: every teacher with every student takes a step; sizes, normalisations, and pairs that do not fit."""

import functools

import pytest
import timm
import torch
import torch.nn.functional as F
from zoo import CLASSES, SHALLOW, STUDENTS, SWIN, TEACHERS, make_student, make_teacher

from scalekd_ds import ScaleKD, Student, Teacher
from scalekd_ds.build import build_distiller
from scalekd_ds.errors import UserError
from scalekd_ds.recipes.command_line import parse_run

pytestmark = pytest.mark.usefixtures("one_thread")

teacher_of = functools.cache(make_teacher)
student_of = functools.cache(make_student)


def pair(teacher, student, image_size=64, **kwargs):
    # a teacher without a classifier has no logits to give
    kd_weight = 0.5 if teacher.num_classes else 0.0
    return ScaleKD(student, teacher, image_size=image_size, kd_weight=kd_weight, verbose=False, **kwargs)


def assert_whole_step(distiller):
    """Every term, a gradient wherever there is something to learn, and none in the teacher."""
    for parameter in distiller.parameters():
        parameter.grad = None
    losses = distiller(torch.randn(2, 3, *distiller.image_size), torch.tensor([1, 7]))
    losses["loss/total"].backward()
    terms = {"ce", "spatial_s3", "frequency_s3", "spatial_s4", "frequency_s4", "total"}
    terms |= {"kd"} if distiller.teacher.num_classes else set()
    assert {name.removeprefix("loss/") for name in losses} == terms
    assert all(torch.isfinite(value) and value > 0 for value in losses.values())
    for name, parameter in distiller.projectors.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        # biases before a softmax, a BatchNorm or the frequency view's filter move nothing
        assert parameter.ndim == 1 or parameter.grad.any(), name
    assert next(distiller.student.parameters()).grad.any()
    assert all(p.grad is None and not p.requires_grad for p in distiller.teacher.parameters())


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_every_pair_takes_a_step(teacher, student):
    assert_whole_step(pair(teacher_of(teacher), student_of(student)))


# teacher, its arguments, student, its arguments, images' (h, w), grids before and at the teacher's last stage
SIZES = {
    "swin, not square": (
        ("swin_tiny_patch4_window7_224", {"img_size": (64, 128)}, "convnext_tiny", {}, (64, 128)),
        ((4, 8), (2, 4)),
    ),
    "convnext, not square": (
        ("convnext_tiny", {"input_size": (64, 96)}, "resnet18", {}, (64, 96)),
        ((4, 6), (2, 3)),
    ),
    "pvt, not square, its stages rounded up": (
        ("pvt_v2_b1", {"input_size": (70, 90)}, "resnet18", {}, (64, 96)),
        ((5, 6), (3, 3)),
    ),
    "vit on vit, not square": (
        (
            "vit_small_patch14_dinov2",
            {"img_size": (70, 112)},
            "vit_small_patch16_224",
            {"img_size": (64, 96)},
            (64, 96),
        ),
        ((5, 8), (5, 8)),
    ),
    "beit on a cnn, not square": (
        ("beitv2_base_patch16_224", {"img_size": (96, 64)}, "mobilenetv3_small_050", {}, (96, 64)),
        ((6, 4), (6, 4)),
    ),
    "336 on 336": (
        ("eva02_tiny_patch14_336", {"img_size": 336}, "eva02_tiny_patch14_336", SHALLOW, (336, 336)),
        ((24, 24), (24, 24)),
    ),
    "384 on 224": (
        ("swin_base_patch4_window12_384", {}, "resnet18", STUDENTS["resnet18"], (224, 224)),
        ((24, 24), (12, 12)),
    ),
    "224 on 384": (
        ("vit_base_patch16_224.augreg_in21k", {"img_size": 224}, "resnet18", STUDENTS["resnet18"], (384, 384)),
        ((14, 14), (14, 14)),
    ),
}


@pytest.mark.parametrize("case", SIZES)
def test_images_of_other_sizes_and_shapes_take_a_step(case):
    (teacher_name, teacher_kwargs, name, kwargs, image_size), grids = SIZES[case]
    shrunk = TEACHERS.get(teacher_name, SWIN | {"window_size": 12, "num_classes": CLASSES})
    teacher = Teacher(teacher_name, weights="none", **({"num_classes": CLASSES} | shrunk | teacher_kwargs))
    assert (teacher.last_input.grid, teacher.last_output.grid) == grids
    student = Student(name, CLASSES, **(STUDENTS.get(name, {}) | kwargs))
    assert_whole_step(pair(teacher, student, image_size))


@pytest.mark.parametrize("teacher", ["swin_tiny_patch4_window7_224", "eva02_tiny_patch14_336", "convnext_tiny"])
@pytest.mark.parametrize("student", ["resnet18", "vit_small_patch16_224"])
def test_the_teacher_gets_images_in_its_own_size_and_normalisation(teacher, student):
    """Tokens of a batch that is normalised for the student are those of the same pixels, normalised for the teacher."""
    student, teacher = student_of(student), teacher_of(teacher)
    distiller = pair(teacher, student)
    raw = torch.rand(2, 3, 64, 64)

    def normalised(images, wants):
        mean, std = (torch.tensor(v)[:, None, None] for v in (wants.mean, wants.std))
        return (images - mean) / std

    seen = F.interpolate(raw, teacher.preprocessing.size, mode="bicubic", antialias=True)
    expected = teacher.targets(normalised(seen, teacher.preprocessing)).tokens
    tokens = distiller.teacher_targets(normalised(raw, student.preprocessing)).tokens
    torch.testing.assert_close(tokens, expected, rtol=1e-3, atol=1e-4)


def config_of(*args):
    arguments = ("--teacher_weights", "none", *args)
    return parse_run([str(a) for a in (*arguments, "--run.dir", "runs/none", "--data.root", "data")])[0]


@pytest.mark.parametrize(
    ("teacher", "student", "words"),
    [
        ("vit_large_patch14_dinov2", "convnext_tiny", ("14x14 x 384", "16x16 x 1024, 16 heads", "heads s3 16, s4 16")),
        (
            "swinv2_base_window8_256",
            "efficientformer_l1",
            ("7x7 x 448", "14x14 x 512, 16 heads", "7x7 x 1024, 32 heads"),
        ),
        ("convnext_large", "mixer_b16_224", ("14x14 x 768", "14x14 x 768, 24 heads", "7x7 x 1536, 48 heads")),
        pytest.param(
            *("pvt_v2_b5", "mobilenetv4_conv_small", ("7x7 x 960", "14x14 x 320, 5 heads", "7x7 x 512, 8 heads")),
            marks=pytest.mark.slow,
        ),
        ("vit_so400m_patch14_siglip_384", "fastvit_t8", ("7x7 x 384", "16x16 x 1152, 16 heads")),
    ],
)
def test_a_pair_by_name_at_true_size_has_the_known_grids_and_heads(teacher, student, words):
    """On the meta device, which has shapes and no memory: everything that a command line leaves out is found."""
    cfg = config_of("--teacher", teacher, "--student", student, "--data.image_size", 224)
    if teacher.startswith("swinv2"):
        cfg.teacher_kwargs = {"window_size": 7}
    with torch.device("meta"):
        table = build_distiller(cfg, 1000, verbose=False).pairing()
    assert all(word in table for word in words), table


def assert_refused(words, *args):
    """One line that says `words`; the teachers are small, so that nothing but the misfit is left to find."""
    student = () if "--student" in args else ("--student", "resnet18")
    cfg = config_of("--data.image_size", 64, "--distill.kd_weight", 0, *student, *args)
    with pytest.raises(UserError, match=words) as error:
        build_distiller(cfg, CLASSES, verbose=False)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("teacher", "stage", "width"), [("pvt_v2_b0", "s3", 160), ("convnext_atto", "s4", 320)])
def test_heads_must_divide_the_teachers_width(teacher, stage, width):
    words = f"projectors of {stage}: num_heads is 7: it must divide the teacher's width, {width}"
    assert_refused(words, "--teacher", teacher, f"--distill.heads_{stage}", 7)


@pytest.mark.parametrize(("teacher", "patch"), [("vit_tiny_patch16_224", 16), ("swin_tiny_patch4_window7_224", 4)])
def test_a_teachers_images_must_be_whole_patches(teacher, patch):
    words = f"cannot take 70x70 images: its patches are {patch}x{patch} pixels; set --teacher_image_size to a multiple"
    assert_refused(words, "--teacher", teacher, "--teacher_image_size", 70)


# what is given on the command line, and what the line says
BAD = {
    "a last stage that is not known": (
        ("--teacher", "mobilenetv3_small_100"),
        r"MobileNetV3 cannot be a ScaleKD teacher.*SwinTransformer, .*ConvNeXt, .*register_family.*--distill.features",
    ),
    "blocks without an attention of their own": (
        ("--teacher", "vit_base_patch16_xp_224"),
        r"blocks are ParallelScalingBlock: they have no separate attention.*--distill.features false",
    ),
    "another size than the one that it is built for": (
        ("--teacher", "vit_tiny_patch16_224", "--teacher_image_size", 96, "--teacher_kwargs.img_size", 64),
        r"was built for 64x64 images and cannot take 96x96: build it with img_size",
    ),
    "images that are smaller than its strides": (
        ("--teacher", "convnext_atto", "--teacher_image_size", 16),
        r"the teacher \(ConvNeXt\) cannot take 16x16 images",
    ),
    "a student's size": (
        ("--teacher", "vit_tiny_patch16_224", "--student", "efficientformer_l1"),
        r"the student \(EfficientFormer\) cannot take 64x64 images",
    ),
    "a student's grid before the last stage": (
        ("--teacher", "vit_tiny_patch16_224", "--student", "vit_tiny_patch16_224", "--student_kwargs.patch_size", 4),
        r"16x16, more than twice the teacher's 4x4",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_pair_that_does_not_fit_is_refused_in_one_line(case):
    args, words = BAD[case]
    assert_refused(words, *args)


@pytest.mark.parametrize(("patch", "fits"), [(16, True), (8, True), (4, False)])
def test_a_students_grid_may_be_up_to_twice_the_teachers(patch, fits):
    """Keys may be finer than queries, as for a high-resolution student of a teacher at 224 pixels; not another stage's."""
    teacher = teacher_of("deit3_small_patch16_224")
    student = timm.create_model("vit_tiny_patch16_224", img_size=64, patch_size=patch, num_classes=CLASSES, **SHALLOW)
    if fits:
        assert_whole_step(pair(teacher, student))
    else:
        with pytest.raises(UserError, match="map before its last stage is 16x16, more than twice the teacher's 4x4"):
            pair(teacher, student)


def test_the_teachers_image_size_is_never_ignored():
    """A convolutional teacher keeps its own size unless it is given one; a grid is built for the student's."""
    for name, own in (("convnext_atto", (224, 224)), ("vit_tiny_patch16_224", (64, 64))):
        cfg = config_of("--data.image_size", 64, "--distill.kd_weight", 0, "--student", "resnet10t", "--teacher", name)
        teacher = build_distiller(cfg, CLASSES, verbose=False).teacher
        assert teacher.preprocessing.size == own
        cfg.teacher_image_size = 96
        teacher = build_distiller(cfg, CLASSES, verbose=False).teacher
        assert teacher.preprocessing.size == (96, 96)
        assert teacher.last_input.grid == (6, 6)
