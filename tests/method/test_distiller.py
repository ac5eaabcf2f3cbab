"""ScaleKD as a module in anyone's own loop: pairing, terms and weights, what is and is not inside it."""

import pytest
import timm
import torch
import torch.nn.functional as F
from tiny_pair import RESNET, SWIN, batch, student, teacher
from zoo import SHALLOW

from scalekd_ds import ScaleKD, Teacher
from scalekd_ds.errors import UserError


def test_a_plain_pytorch_loop_lowers_the_loss():
    distiller = ScaleKD(student(), teacher(), image_size=64, verbose=False)
    optimizer = torch.optim.AdamW(distiller.parameters(), 1e-3)
    images, labels = batch()
    totals = []
    for _ in range(8):
        losses = distiller(images, labels)
        optimizer.zero_grad()
        losses["loss/total"].backward()
        optimizer.step()
        totals.append(losses["loss/total"].item())
    assert totals[-1] < 0.9 * totals[0]


@pytest.mark.parametrize("name", ["teacher", "tapped_student"])
def test_a_model_is_not_replaced_by_an_assignment(name):
    distiller = ScaleKD(student(), teacher(), image_size=64, verbose=False)
    own, names = getattr(distiller, name), set(distiller.state_dict())
    for other in (None, torch.nn.Linear(1, 1)):
        with pytest.raises(AttributeError, match=f"{name} cannot be replaced.*build another ScaleKD"):
            setattr(distiller, name, other)
    assert getattr(distiller, name) is own and set(distiller.state_dict()) == names


def test_total_is_the_sum_of_the_weighted_terms():
    distiller = ScaleKD(student(), teacher(), image_size=64, verbose=False)
    images, labels = batch()
    distiller.eval()
    losses = distiller(images, labels)
    parts = [v for k, v in losses.items() if k != "loss/total"]
    assert {k.removeprefix("loss/") for k in losses} == {*distiller.weights(), "total"}
    assert losses["loss/total"].item() == pytest.approx(sum(p.item() for p in parts), rel=1e-6)
    logits = distiller.student(images)
    assert losses["loss/ce"].item() == pytest.approx(0.5 * F.cross_entropy(logits, labels).item(), rel=1e-5)
    # a distance between unit vectors is at most 4 a token
    assert 0 < losses["loss/spatial_s4"].item() < 0.08 * 4 * 64
    doubled = ScaleKD(student(), teacher(), image_size=64, verbose=False, weights_s4=(0.16, 0.12))
    doubled.load_state_dict(distiller.state_dict())
    again = doubled.eval()(images, labels)
    for view in ("spatial", "frequency"):
        assert again[f"loss/{view}_s4"].item() == pytest.approx(2 * losses[f"loss/{view}_s4"].item(), rel=1e-5)


def test_the_teacher_is_outside_and_moves_along():
    distiller = ScaleKD(student(), teacher(), image_size=64, verbose=False)
    inside = {id(p) for p in distiller.parameters()} | {id(b) for b in distiller.buffers()}
    assert not any(id(p) in inside for p in distiller.teacher.parameters())
    assert not any("teacher" in k for k in distiller.state_dict())
    distiller.train()
    assert not any(m.training for m in distiller.teacher.modules())
    distiller.double()
    assert all(p.dtype == torch.float64 for p in distiller.teacher.parameters())


def test_the_students_state_loads_into_timms_model():
    distiller = ScaleKD(student(), teacher(), image_size=64, verbose=False)
    timm.create_model("resnet18", num_classes=10, **RESNET).load_state_dict(distiller.student.state_dict(), strict=True)


def test_every_projector_learns_and_the_teacher_does_not():
    distiller = ScaleKD(student(), teacher(), image_size=64, verbose=False)
    distiller(*batch())["loss/total"].backward()
    without = [n for n, p in distiller.named_parameters() if p.grad is None]
    assert without == []
    assert all(p.grad is None for p in distiller.teacher.parameters())


def test_stage_4_reaches_the_stage_3_projectors_through_its_queries():
    distiller = ScaleKD(student(), teacher(), image_size=64, verbose=False)
    distiller(*batch())["loss/spatial_s4"].backward()
    assert distiller.projectors["s3"].spatial.q.weight.grad.abs().sum() > 0
    assert distiller.projectors["s3"].frequency.q.weight.grad.abs().sum() == 0


def test_the_pairing_is_printed_with_its_models_grids_heads_and_weights(capsys):
    ScaleKD(student(), teacher(), image_size=64)
    table = capsys.readouterr().out
    for words in ("ResNet", "SwinTransformer", "4x4 x 32", "16x16 x 24, 2 heads", "8x8 x 48, 4 heads", "kd=0.5"):
        assert words in table
    assert "2x2 x 64" in table


@pytest.mark.parametrize(
    ("student_name", "teacher_name", "teacher_kwargs"),
    [
        ("convnext_atto", "swin_tiny_patch4_window7_224", SWIN),
        ("mixer_s16_224", "vit_tiny_patch16_224", SHALLOW | {"img_size": 64}),
        ("vit_tiny_patch16_224", "beit_base_patch16_224", SHALLOW | {"img_size": 64, "num_heads": 4}),
        ("resnet18", "eva02_tiny_patch14_336", SHALLOW | {"img_size": 56, "num_heads": 4}),
    ],
)
def test_a_pair_by_name_takes_a_step(student_name, teacher_name, teacher_kwargs):
    """Channels, grids, heads, prefix tokens and sizes are found by themselves."""
    pair_teacher = Teacher(teacher_name, weights="none", num_classes=10, **teacher_kwargs)
    distiller = ScaleKD(student_name, pair_teacher, image_size=64, verbose=False)
    losses = distiller(*batch())
    losses["loss/total"].backward()
    assert all(torch.isfinite(v) for v in losses.values())
    assert all(p.grad is not None for p in distiller.projectors.parameters())


def test_the_teacher_gets_its_own_normalisation_and_size():
    inner = teacher(img_size=32, window_size=4, patch_size=2)
    inner.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    seen = []
    inner.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    wrapped = Teacher(inner)
    wrapped.targets = lambda images: seen.append(images) or Teacher.targets(wrapped, images)
    pupil = student()
    pupil.pretrained_cfg = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    distiller = ScaleKD(pupil, wrapped, image_size=64, verbose=False)
    raw = torch.rand(1, 3, 1, 1).expand(1, 3, 64, 64)
    mean, std = (torch.tensor(v)[:, None, None] for v in pupil.pretrained_cfg.values())
    distiller.teacher_targets((raw - mean) / std)
    assert seen[-1].shape == (1, 3, 32, 32)
    assert torch.allclose(seen[-1], ((raw - 0.5) / 0.5)[..., :32, :32], atol=1e-5)


def test_without_a_teacher_it_is_supervised_training():
    distiller = ScaleKD(student(), None, image_size=64, verbose=False)
    images, labels = batch()
    distiller.eval()
    losses = distiller(images, labels)
    assert set(losses) == {"loss/ce", "loss/total"}
    assert losses["loss/ce"].item() == pytest.approx(
        F.cross_entropy(distiller.student(images), labels).item(), rel=1e-5
    )


def test_a_term_with_weight_zero_has_no_projector():
    distiller = ScaleKD(student(), teacher(), image_size=64, verbose=False, kd_weight=0.0, weights_s4=(0.08, 0.0))
    assert {stage: pair.names for stage, pair in distiller.projectors.items()} == {
        "s3": ("spatial", "frequency"),
        "s4": ("spatial",),
    }
    losses = distiller(*batch())
    assert set(losses) == {"loss/ce", "loss/spatial_s3", "loss/frequency_s3", "loss/spatial_s4", "loss/total"}
    losses["loss/total"].backward()
    assert all(p.grad is not None for p in distiller.parameters())


@pytest.mark.parametrize("kd_weight", [0.5, 0.0, 1.0])
def test_images_without_labels_leave_ce_out_and_nothing_else(kd_weight):
    distiller = ScaleKD(student(), teacher(), image_size=64, verbose=False, kd_weight=kd_weight).eval()
    images, labels = batch()
    labelled, unlabelled = distiller(images, labels), distiller(images)
    shared = {name for name in labelled if name not in ("loss/ce", "loss/total")}
    assert set(unlabelled) == shared | {"loss/total"}
    assert ("loss/ce" in labelled) == (kd_weight < 1.0) and ("loss/kd" in unlabelled) == (kd_weight > 0.0)
    for name in shared:
        torch.testing.assert_close(unlabelled[name], labelled[name])
    ce = labelled["loss/ce"].item() if kd_weight < 1.0 else 0.0
    assert unlabelled["loss/total"].item() == pytest.approx(labelled["loss/total"].item() - ce, rel=1e-5)
    unlabelled["loss/total"].backward()
    head = distiller.student.get_classifier().weight.grad
    assert (head is None) == (kd_weight == 0.0)
    assert all(p.grad is not None for p in distiller.projectors.parameters())


def test_kd_alone_is_the_distance_to_the_teachers_own_answer():
    distiller = ScaleKD(student(), teacher(), image_size=64, verbose=False, kd_weight=1.0, features=False).eval()
    images, _ = batch()
    wanted = F.cross_entropy(distiller.student(images), distiller.teacher_targets(images).logits.softmax(-1))
    assert distiller(images)["loss/total"].item() == pytest.approx(wanted.item(), rel=1e-5)
    assert distiller.weights() == {"kd": 1.0}


@pytest.mark.parametrize("options", [{"teacher": None}, {"teacher": teacher(), "features": False, "kd_weight": 0.0}])
def test_without_labels_a_term_must_be_left(options):
    distiller = ScaleKD(student(), image_size=64, verbose=False, **options)
    with pytest.raises(UserError, match="targets is None and no term does without labels"):
        distiller(batch()[0])


def test_targets_that_are_given_are_used_and_not_computed():
    distiller = ScaleKD(student(), teacher(), image_size=64, verbose=False).eval()
    images, labels = batch()
    targets = distiller.teacher_targets(images)
    distiller.teacher.targets = None
    assert torch.isfinite(distiller(images, labels, targets)["loss/total"])


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: ScaleKD(student(7), teacher(), image_size=64), "the teacher has 10 classes and the student 7"),
        (lambda: ScaleKD(student(), teacher(), image_size=64, heads_s3=5), "projectors of s3: num_heads is 5"),
    ],
)
def test_classes_or_heads_that_do_not_fit_are_refused(build, words):
    with pytest.raises(UserError) as error:
        build()
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_an_image_size_that_the_teacher_cannot_take_is_refused():
    with pytest.raises(UserError, match=r"cannot be built with .*img_size"):
        Teacher("swin_tiny_patch4_window7_224", image_size=0, weights="none")
    built = Teacher("vit_tiny_patch16_224", weights="none", depth=2, num_classes=10)
    built.preprocessing = built.preprocessing.__class__(None, None, None)
    with pytest.raises(UserError, match=r"the teacher \(VisionTransformer\) cannot take 64x64 images"):
        ScaleKD(student(), built, image_size=64)
