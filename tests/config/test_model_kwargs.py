"""Constructor arguments in --student_kwargs and --teacher_kwargs: they work, or one line says what to give instead."""

import itertools
import json

import pytest
import torch
from tiny_pair import SWIN
from tiny_run import RESNET

from scalekd_ds.build import build_distiller
from scalekd_ds.config import DataConfig, DistillConfig, RunConfig
from scalekd_ds.config.model_kwargs import _STUDENT, _TEACHER
from scalekd_ds.errors import UserError
from scalekd_ds.recipes.command_line import parse_run

pytestmark = pytest.mark.usefixtures("one_thread")

VALUES = (None, True, 4, "x", [1], {"a": 1})


@pytest.mark.parametrize(("key", "refused"), [("student_kwargs", _STUDENT), ("teacher_kwargs", _TEACHER)])
def test_what_has_a_flag_is_refused_with_its_name(key, refused):
    """Every such argument with values of every kind, as one JSON and as a dotted flag."""
    tried = 0
    for (name, instead), value in itertools.product(refused.items(), VALUES):
        if isinstance(value, dict) and name == "kwargs":
            continue
        with pytest.raises(UserError) as error:
            RunConfig(**{key: {name: value}})
        text = str(error.value)
        assert text == f"{key} has {name!r}: {instead}." and "\n" not in text, (name, value)
        tried += 1
    assert tried > 100


@pytest.mark.parametrize(
    "words",
    [
        ["--student_kwargs", '{"num_classes": 4}'],
        ["--student_kwargs.pretrained", "true"],
        ["--student_kwargs.image_size", "32"],
        ["--student_kwargs", '{"checkpoint_path": "nowhere.pth"}'],
        ["--teacher_kwargs.features_only", "true"],
        ["--teacher_kwargs", '{"self": 1}'],
        ["--student_kwargs.img_size", "64"],
        ["--student_kwargs", json.dumps({"in_chans": 1})],
        ["--teacher_kwargs.num_classes", "many"],
    ],
)
def test_the_command_line_refuses_it_as_well(words):
    with pytest.raises(UserError, match="_kwargs") as error:
        parse_run(words)
    assert "\n" not in str(error.value)


def test_every_parameter_of_timms_factory_is_known():
    """A newer timm may have one more that is no argument of a model's constructor."""
    import inspect

    import timm

    own = {name for name in inspect.signature(timm.create_model).parameters if name != "kwargs"}
    assert own <= set(_STUDENT) and own <= set(_TEACHER)


def configured(student, kwargs, **more) -> RunConfig:
    return RunConfig(
        student=student,
        student_kwargs=kwargs,
        data=DataConfig(image_size=32),
        distill=DistillConfig(norm="layer"),
        **more,
    )


def step(cfg: RunConfig, classes: int = 3) -> float:
    """One forward and backward pass as a run makes it."""
    distiller = build_distiller(cfg, classes, verbose=False)
    distiller.train()
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, classes - 1])
    targets = distiller.teacher_targets(images) if distiller.teacher is not None else None
    loss = distiller(images, labels, targets)["loss/total"]
    loss.backward()
    return float(loss)


def works_or_one_line(cfg_of, classes: int = 3) -> str | None:
    """The line, or None where a step is made."""
    try:
        loss = step(cfg_of(), classes)
    except UserError as error:
        text = str(error)
        assert "\n" not in text and "\x1b" not in text and len(text) > 20, text
        return text
    assert loss == loss
    return None


VIT = {"patch_size": 8, "embed_dim": 36, "depth": 4, "num_heads": 3}
CONVNEXT = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32], "output_stride": 8}
MODELS = {
    "resnet18": RESNET,
    "vit_tiny_patch16_224": VIT,
    "swin_tiny_patch4_window7_224": SWIN | {"img_size": 32},
    "convnext_atto": CONVNEXT,
    "mixer_b14_224": {"patch_size": 8, "num_blocks": 4, "embed_dim": 32},
}
# argument -> values that a user may think of
ODD = {
    "in_chans": (3, 1, 4, 0, "three", None),
    "drop_path_rate": (0.1, "high", -1.0, [0.1], None, {}),
    "drop_rate": (0.1, 1.5, "x", None),
    "global_pool": ("avg", "max", "", "nonsense", 7, None, False),
    "img_size": (32, [32, 32], 64, 0, "x", [32], None),
    "patch_size": (4, 7, 0, -4, "x"),
    "embed_dim": (36, 0, -3, 7, "x"),
    "depth": (4, 0, 1, "x"),
    "depths": ([1, 1], [], [1, "x"], 3),
    "num_heads": (2, 0, 5, "x", [1]),
    "output_stride": (32, 3, "x"),
    "act_layer": ("gelu", "nonsense", 3),
    "norm_layer": ("layernorm", "nonsense", 3),
    "block": ("nonsense", None),
    "window_size": (0, -1, "x", 64),
    "nonsense": (1, None),
    "": (1,),
    "self": (1,),
    "with space": (1,),
}


@pytest.mark.parametrize("model", MODELS)
def test_an_odd_argument_of_a_student_works_or_is_one_line(model):
    """Over 70 arguments a model."""
    refused, tried = 0, 0
    for name, values in ODD.items():
        for value in values:
            line = works_or_one_line(lambda name=name, value=value: configured(model, MODELS[model] | {name: value}))
            refused += line is not None
            tried += 1
    assert tried > 70 and 20 < refused < tried


def test_an_odd_argument_of_a_teacher_works_or_is_one_line():
    for name, values in {**ODD, "num_classes": (3, 4, 0, 1, -1, "x", None, True, 2.5)}.items():
        for value in values:
            kwargs = SWIN | {"img_size": 32, "num_classes": 3} | {name: value}
            more = {"teacher": "swin_tiny_patch4_window7_224", "teacher_weights": "none", "teacher_kwargs": kwargs}
            works_or_one_line(lambda more=more: configured("resnet18", RESNET, **more))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("loss", ["ce", "bce"])
def test_one_class_works(model, loss):
    assert works_or_one_line(lambda: configured(model, MODELS[model], loss=loss), classes=1) is None


@pytest.mark.parametrize("value", ["5", "[1]", "null", "text", "{", "true"])
@pytest.mark.parametrize("key", ["student_kwargs", "teacher_kwargs"])
def test_what_is_no_object_is_one_line(key, value):
    with pytest.raises(UserError) as error:
        parse_run([f"--{key}", value])
    assert key in str(error.value) and "\n" not in str(error.value)
