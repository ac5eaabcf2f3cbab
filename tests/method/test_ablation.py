"""The paper's ablations: what each flag takes away, and the table of them."""

import importlib
import json
import sys

import pytest
import torch
from forking import forked
from launching import ROOT
from timm.models.swin_transformer import SwinTransformer
from torch import nn
from zoo import SWIN, make_student, make_teacher
from zoo import TEACHERS as ALL_TEACHERS

from scalekd_ds import ScaleKD, Teacher
from scalekd_ds.errors import UserError
from scalekd_ds.losses import dual_view_loss
from scalekd_ds.projector.linear import LinearPair, LinearProjector
from scalekd_ds.teacher import FAMILIES, Family, Stage

# scripts, not a package: they import each other by their plain names
sys.path.append(str(ROOT / "benchmarks"))
ablation, seeds = map(importlib.import_module, ("ablation", "seeds"))

TEACHERS = ("swin_tiny_patch4_window7_224", "convnext_tiny", "deit3_small_patch16_224", "vit_small_patch14_reg4_dinov2")


def distil(teacher="swin_tiny_patch4_window7_224", **options):
    torch.manual_seed(2)
    return ScaleKD(make_student("resnet18"), make_teacher(teacher), image_size=64, verbose=False, **options).train()


def step(distiller):
    generator = torch.Generator().manual_seed(3)
    images, labels = torch.randn(4, 3, 64, 64, generator=generator), torch.tensor([0, 1, 2, 3])
    losses = distiller(images, labels)
    losses["loss/total"].backward()
    assert all(p.grad is not None for p in distiller.projectors.parameters())
    return images, losses


def test_linear_projectors_stand_in_for_cap():
    distiller = distil(projector="linear")
    assert all(isinstance(pair, LinearPair) for pair in distiller.projectors.values())
    _, losses = step(distiller)
    assert {f"loss/{view}_{stage}" for view in ("spatial", "frequency") for stage in ("s3", "s4")} <= losses.keys()
    assert "linear" in distiller.pairing()


def test_a_linear_projector_is_a_convolution_and_a_resize():
    projector = LinearProjector(6, 8, (4, 4))
    x = torch.randn(2, 6, 8, 8)
    expected = nn.functional.interpolate(
        torch.einsum("bchw,oc->bohw", x, projector.proj.weight[:, :, 0, 0]) + projector.proj.bias[:, None, None],
        (4, 4),
        mode="bilinear",
    )
    assert torch.allclose(projector(x), expected.flatten(2).mT, atol=1e-6)


@pytest.mark.parametrize("name", TEACHERS)
def test_without_tpp_stage_n_minus_1_is_matched_to_the_teachers_own(name):
    distiller = distil(name, tpp=False, kd_weight=0.0)
    teacher = distiller.teacher
    images, losses = step(distiller)
    with torch.no_grad():
        targets = distiller.teacher_targets(images)
        assert targets.before.shape[1:] == (
            teacher.last_input.grid[0] * teacher.last_input.grid[1],
            teacher.last_input.dim,
        )
        if teacher.num_classes and not hasattr(teacher.model, "blocks"):
            # the teacher's own tokens there, which its last stage takes to the target
            assert torch.allclose(teacher.last_stage(targets.before), targets.tokens, atol=1e-5)
        projected = distiller.eval().project(distiller.tapped_student(images))
        distiller.train()
        student = distiller.tapped_student(images)
        own = distiller.projectors["s3"](student.before)
    expected = dual_view_loss(own[0], own[1], targets.before, teacher.last_input.grid, (0.08, 0.06))
    assert losses["loss/spatial_s3"].item() == pytest.approx(expected[0].item(), rel=1e-4)
    assert losses["loss/frequency_s3"].item() == pytest.approx(expected[1].item(), rel=1e-4)
    assert projected["s3"]["spatial"].shape == targets.before.shape
    # the last stage's queries are its own
    assert all(view.query is not None for view in distiller.projectors["s4"].views)


@pytest.mark.parametrize("name", ALL_TEACHERS)
def test_the_tokens_before_the_last_stage_are_what_it_is_given(name):
    teacher = make_teacher(name)
    model, seen = teacher.model, []
    if hasattr(model, "blocks"):
        # the last of the zoo's four blocks; its input has the class token and registers in front
        last, to_tokens = model.blocks[-1], lambda x: x[:, x.shape[1] - teacher.last_input.grid[0] ** 2 :]
    elif hasattr(model, "layers"):
        last, to_tokens = model.layers[-1], lambda x_BHWC: x_BHWC.flatten(1, 2)
    else:
        last, to_tokens = model.stages[-1], lambda x_BCHW: x_BCHW.flatten(2).mT
    images = torch.randn(2, 3, *teacher.preprocessing.size)
    # before the call: one that stops early never gets to the last stage
    handle = last.register_forward_pre_hook(lambda _, inputs: seen.append(to_tokens(inputs[0])))
    teacher.targets(images)
    handle.remove()
    torch.testing.assert_close(teacher.before_last_stage(images), seen[0])


def test_a_registered_family_with_another_last_stage_cannot_go_without_tpp(monkeypatch):
    """timm would stop before its own last stage, whose tokens are not those that the family's last stage takes."""

    class TwoStages(SwinTransformer):
        pass

    swin = FAMILIES[SwinTransformer]
    two = Family(swin.forward, swin.last_stage, lambda model: (Stage((16, 16), 24, 1), swin.stages(model)[1]))
    monkeypatch.setitem(FAMILIES, TwoStages, two)
    model = TwoStages(img_size=64, window_size=4, num_classes=10, **SWIN)
    with pytest.raises(
        UserError,
        match=r"^the teacher \(TwoStages\) does not give .* 16x16 of 24 channels, .* leave out --distill.tpp false",
    ):
        ScaleKD(make_student("resnet18"), Teacher(model), image_size=64, verbose=False, tpp=False)


def test_with_tpp_nothing_more_is_computed():
    distiller = distil()
    tokens, logits = distiller.teacher_targets(torch.randn(1, 3, 64, 64))
    assert tokens.ndim == 3 and logits.shape == (1, 10)


def test_the_scripts_table_and_chart_have_all_rows(tmp_path):
    """Of accuracies that are made up: means, differences to the first row, errors."""
    top1 = {row: [80.0 + i + s for s in range(3)] for i, row in enumerate(ablation.ROWS)}
    rows = seeds.summary(top1, ablation.FULL)
    ablation.plot(rows, tmp_path / "chart.png")
    assert rows[0]["row"] == "ScaleKD" and len(rows) == 9
    assert rows[3]["mean"] == 84.0 and rows[3]["difference"] == 3.0 and rows[3]["error"] == 0.0
    assert (tmp_path / "chart.png").stat().st_size > 5000


def test_every_row_is_a_run_of_its_own():
    from scalekd_ds.recipes.command_line import parse_run

    full = parse_run(["--recipe", "fashion-scalekd"])[0]
    changed = {row: parse_run(["--recipe", "fashion-scalekd", *more])[0] for row, more in ablation.ROWS.items()}
    assert changed.pop("ScaleKD") == full
    assert len({json.dumps(cfg.as_dict()) for cfg in changed.values()} | {json.dumps(full.as_dict())}) == 9


def test_an_unknown_row_is_refused(tmp_path):
    done = forked(ROOT / "benchmarks" / "ablation.py", "--rows", "everything")
    assert done.returncode == 2 and "--rows has 'everything': it must be some of ScaleKD" in done.stderr
