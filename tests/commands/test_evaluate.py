"""Evaluation at settings other than those of training."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from image_fixtures import make_dataset
from safetensors.torch import load_file
from tiny_run import RESNET
from weight_files import VIT

from scalekd_ds.checkpoint.plain_weights import write_student
from scalekd_ds.commands.evaluate import main
from scalekd_ds.data import EvalLoader
from scalekd_ds.errors import UserError
from scalekd_ds.evaluation import standalone
from scalekd_ds.evaluation.standalone import evaluate_model
from scalekd_ds.models.card import eval_resize_at

pytestmark = pytest.mark.usefixtures("one_thread")

STUDENTS = {"resnet18": RESNET, "vit_tiny_patch16_224": VIT}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"), train=3, val=9, classes=3, size=(40, 56))


def student(folder: Path, name: str, eval_resize: int | None) -> str:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **STUDENTS[name])
    card = {
        "architecture": name,
        "model_kwargs": STUDENTS[name],
        "num_classes": 3,
        "classes": ["class_0", "class_1", "class_2"],
    }
    card |= {
        "image_size": 32,
        "eval_resize": eval_resize,
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "interpolation": "bicubic",
    }
    write_student(folder / "student.safetensors", model.state_dict(), card)
    return str(folder / "student.safetensors")


@pytest.mark.parametrize("name", STUDENTS)
def test_every_combination_evaluates(tmp_path, data, name):
    """Sizes above and below that of training, crops of a card and of an option, batches larger than the set."""
    for trained, size, resize, batch in itertools.product((None, 36), (None, 16, 48, 64), (None, 80), (2, 64)):
        model = student(tmp_path, name, trained)
        result = evaluate_model(model, data, image_size=size, batch_size=batch, threads=1, eval_resize=resize)
        assert result["images"] == 9 and 0 <= result["top1"] <= 100 == result["top5"]


def test_another_size_sees_the_same_share_of_each_image(tmp_path, data, monkeypatch):
    assert eval_resize_at({"eval_resize": 36, "image_size": 32}, 64) == 72
    assert eval_resize_at({"eval_resize": 36, "image_size": 32}, 32) == 36
    assert eval_resize_at({"eval_resize": None, "image_size": 32}, 64) is None and eval_resize_at({}, 64) is None
    logits = []
    for number, resize in enumerate((None, 72, 128)):
        file = tmp_path / f"{number}.safetensors"
        evaluate_model(
            student(tmp_path, "resnet18", 36), data, image_size=64, threads=1, logits_file=file, eval_resize=resize
        )
        logits.append(load_file(file)["logits"].numpy())
    np.testing.assert_array_equal(logits[0], logits[1])
    assert np.abs(logits[0] - logits[2]).max() > 1e-4


def test_a_name_of_timms_is_evaluated_as_timm_evaluates_it(data, monkeypatch, tmp_path, capsys):
    """Where no option says otherwise: timm's crops and filters, which are of each set of weights."""
    seen = []
    monkeypatch.setattr(
        standalone, "EvalLoader", lambda source, cfg, *rest: seen.append(cfg) or EvalLoader(source, cfg, *rest)
    )
    for crop, mode, interpolation, size, resize, side in (
        (0.875, "center", "bilinear", 32, None, 36),
        (0.95, "center", "bicubic", 32, None, 33),
        (0.95, "center", "bicubic", 64, None, 67),
        (0.95, "center", "bicubic", 64, 80, 80),
        (1.0, "squash", "bilinear", 32, None, 32),
    ):
        cfg = {"architecture": "resnet18", "num_classes": 3, "model_args": RESNET, "pretrained_cfg": {
            "input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": interpolation,
            "crop_pct": crop, "crop_mode": mode, "num_classes": 3, "first_conv": "conv1", "classifier": "fc"}}  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(cfg))
        evaluate_model(f"local-dir:{tmp_path}", data, "none", size, threads=1, eval_resize=resize)
        assert (seen[-1].eval_shorter_side, seen[-1].interpolation) == (side, interpolation)
        assert ("timm squashes its images" in capsys.readouterr().out) == (mode == "squash")


def test_weights_with_a_card_are_evaluated_as_they_were_trained(tmp_path, data, capsys):
    """Whether the file is named itself, or as the weights of its timm model, which is of 224 pixels."""
    file = student(tmp_path, "vit_tiny_patch16_224", 36)
    logits = []
    for name, weights in ((file, "pretrained"), ("vit_tiny_patch16_224.augreg_in21k", file)):
        evaluate_model(name, data, weights, threads=1, logits_file=tmp_path / "logits.safetensors")
        logits.append(load_file(tmp_path / "logits.safetensors")["logits"])
    assert torch.equal(*logits) and "has a card: size, crop and filter are those" in capsys.readouterr().out


def test_a_model_of_one_size_says_so(tmp_path, data):
    kwargs = {"embed_dim": 32, "stages": (1, 1, 1, 1), "img_size": 32}
    card = {"architecture": "hiera_tiny_224", "model_kwargs": kwargs, "num_classes": 3, "image_size": 32,
            "mean": [0.5] * 3, "std": [0.25] * 3}  # fmt: skip
    file = tmp_path / "student.safetensors"
    write_student(file, timm.create_model("hiera_tiny_224", num_classes=3, **kwargs).state_dict(), card)
    assert evaluate_model(str(file), data, image_size=32, threads=1)["images"] == 9
    with pytest.raises(
        UserError, match=r"--image-size is 64, and the weights of .* are for images of 32 pixels, since"
    ):
        evaluate_model(str(file), data, image_size=64, threads=1)
    # the file's own fault is not laid to the size
    write_student(file, timm.create_model("hiera_tiny_224", num_classes=5, **kwargs).state_dict(), card)
    with pytest.raises(UserError, match=r"does not fit Hiera"):
        evaluate_model(str(file), data, image_size=64, threads=1)
    with pytest.raises(UserError, match=r"Lambda cannot take 32x32 images: .*; give its own size as --image-size"):
        standalone._check_size(torch.nn.Linear(7, 3), "Lambda", 32, torch.device("cpu"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--image-size", "4"), "--image-size is 4: it must be at least 8 pixels"),
        (("--image-size", "64", "--eval-resize", "48"), "--eval-resize is 48: it must be at least 64 pixels"),
        (("--eval-resize", "16"), "eval_resize is 16"),
        (("--batch-size", "0"), "--batch-size is 0"),
    ],
)
def test_settings_that_cannot_be_are_one_line(tmp_path, data, words, says):
    with pytest.raises(UserError, match=says) as error:
        main([student(tmp_path, "resnet18", None), "--data", str(data), *words])
    assert "\n" not in str(error.value)
