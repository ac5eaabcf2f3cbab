"""Names of classes beside weights: what a run's teacher and student make of them."""

import json

import pytest
import timm
import tiny_pair
import torch
from safetensors.torch import save_file

from scalekd_ds.build import build_distiller
from scalekd_ds.config import RunConfig
from scalekd_ds.errors import UserError
from scalekd_ds.models.build import build_model
from scalekd_ds.models.known_classes import fit_classifier

NAMES = ["ant", "bee", "cat"]
KWARGS = tiny_pair.SWIN | {"img_size": 32}
SWIN = "swin_tiny_patch4_window7_224"


def weights_with_card(path, names, **card):
    """Weights of a Swin of three classes, and their card."""
    model = tiny_pair.teacher(num_classes=3, img_size=32)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    content = {
        "architecture": SWIN,
        "model_kwargs": KWARGS,
        "num_classes": 3,
        "classes": names,
        "image_size": 32,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
    }
    path.with_suffix(".json").write_text(json.dumps(content | card))
    return path


def run_with(path, **more) -> RunConfig:
    """A run whose teacher is the file; by its timm name where `more` has the file as teacher_weights."""
    cfg = RunConfig(student="test_resnet", teacher=str(path), **more)
    cfg.data.image_size = 32
    return cfg


@pytest.mark.parametrize("by", ["card", "weights"])
@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
def test_a_teacher_of_the_same_classes_is_matched_by_name(tmp_path, by, order, capsys):
    names = [NAMES[i] for i in order]
    path = weights_with_card(tmp_path / "t.safetensors", names)
    if by == "card":
        cfg = run_with(path)
    else:
        cfg = run_with(SWIN, teacher_weights=str(path), teacher_kwargs=KWARGS)
    plain = build_distiller(cfg, 3, verbose=False)
    matched = build_distiller(cfg, 3, verbose=False, classes=NAMES)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before, after = (d.teacher_targets(images).logits for d in (plain, matched))
    torch.testing.assert_close(after, before[:, [names.index(name) for name in NAMES]], rtol=0, atol=0)
    assert ("another order" in capsys.readouterr().out) == (order != [0, 1, 2])


def test_a_teacher_of_other_classes_is_refused_where_its_logits_are_distilled(tmp_path, capsys):
    path = weights_with_card(tmp_path / "t.safetensors", ["ant", "bee", "cow"])
    with pytest.raises(
        UserError, match=r"1 only in the set of training images, the first 'cat'.*--distill.kd_weight 0"
    ):
        build_distiller(run_with(path), 3, verbose=False, classes=NAMES)
    cfg = run_with(path)
    cfg.distill.kd_weight = 0.0
    distiller = build_distiller(cfg, 3, verbose=False, classes=NAMES)
    assert not distiller.teacher.same_classes
    assert "its top-1 is not measured" in capsys.readouterr().out


def test_a_teacher_without_names_is_taken_in_the_order_of_training_which_is_said(tmp_path, capsys):
    path = weights_with_card(tmp_path / "t.safetensors", NAMES)
    path.with_suffix(".json").unlink()
    cfg = run_with(SWIN, teacher_weights=str(path), teacher_kwargs=KWARGS)
    distiller = build_distiller(cfg, 3, verbose=False, classes=NAMES)
    assert distiller.teacher.class_positions is None
    said = capsys.readouterr().out
    assert said.count("the teacher has no class names: its outputs are taken in the order") == 1
    assert "0 is 'ant', 2 is 'cat'" in said


@pytest.mark.parametrize(("card", "match"), [
    ({"classes": ["ant", "ant", "bee"]}, "3 names of classes, 2 of them different"),
    ({"classes": ["ant", "bee"]}, "2 names of classes"),
])  # fmt: skip
def test_a_card_whose_names_are_no_list_of_its_classes_is_refused(tmp_path, card, match):
    path = weights_with_card(tmp_path / "t.safetensors", NAMES, **card)
    with pytest.raises(UserError, match=match):
        build_distiller(run_with(path), 3, verbose=False, classes=NAMES)


def test_a_folder_that_timm_pushes_has_names_too(tmp_path):
    from timm.models import save_for_hf

    model = tiny_pair.student(num_classes=3)
    save_for_hf(model, tmp_path / "hub", model_config={"label_names": NAMES[::-1]}, model_args=tiny_pair.RESNET)
    built = build_model(f"local-dir:{tmp_path / 'hub'}", weights="pretrained")
    from scalekd_ds.models.known_classes import known_classes

    assert known_classes(built).schemes == (NAMES[::-1],)


# a linear classifier, a convolution, two heads, a norm inside
HEADS = {
    "resnet18": {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8)},
    "mobilenetv3_small_050": {},
    "levit_128s": {},
    "deit_tiny_distilled_patch16_224": {"depth": 2, "embed_dim": 24},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)},
    "vgg11": {},
    "efficientvit_b0": {},
    "nf_regnet_b0": {},
    "dm_nfnet_f0": {},
    "hardcorenas_a": {},
    "regnetx_002": {},
    "cspresnet50": {},
}


# whose true size is large, and the only one
LARGE = ("vgg11", "dm_nfnet_f0")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LARGE else n for n in HEADS])
def test_a_students_classifier_is_put_into_the_order_of_training(name):
    model = timm.create_model(name, num_classes=3, **HEADS[name]).eval()
    names = ["bee", "cat", "ant"]
    model.pretrained_cfg = dict(model.pretrained_cfg or {}, label_names=names)
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(images)
        assert "another order" in fit_classifier(model, NAMES)
        after = model(images)
    torch.testing.assert_close(after, before[:, [names.index(name) for name in NAMES]])
    assert fit_classifier(model, ["x", "y", "z"]).endswith("the student's classifier is initialised anew")
    with torch.no_grad():
        assert model(images).shape == (1, 3)
