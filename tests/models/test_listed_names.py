"""Names of classes that other tools keep: a model's outputs mean what they say, or one line tells why they cannot."""

import json

import pytest
import timm
import torch
from timm.data import ImageNetInfo
from timm.models import save_for_hf
from weight_files import RESNET

from scalekd_ds.class_names import match_classes
from scalekd_ds.errors import UserError
from scalekd_ds.models.build import build_model
from scalekd_ds.models.known_classes import known_classes

NAMES = ["ant", "bee", "cat"]
REVERSED = NAMES[::-1]
AT = dict(enumerate(REVERSED))
AS_TEXT = {str(place): name for place, name in AT.items()}
TO = {name: place for place, name in AT.items()}


def positions(model):
    """The output of each of NAMES."""
    return match_classes(known_classes(model), 3, NAMES, "MODEL", "DATA").positions.tolist()


def network(classes=3):
    return timm.create_model("resnet18", num_classes=classes, **RESNET)


# what a config.json has -> whether that are the names, in reversed order
CONFIGS = {
    "timm's list": {"label_names": REVERSED},
    "timm's dict": {"label_names": AS_TEXT},
    "in another order": {"label_names": dict(reversed(AS_TEXT.items()))},
    "timm's older key": {"labels": REVERSED},
    "timm's descriptions": {
        "label_names": ["n3", "n2", "n1"],
        "label_descriptions": {"n1": "ant", "n2": "bee", "n3": "cat"},
    },
    "id2label": {"id2label": AS_TEXT},
    "label2id": {"label2id": TO},
    "label2id as text": {"label2id": {name: str(place) for name, place in TO.items()}},
    "nobody's": {"id2label": {str(i): f"LABEL_{i}" for i in range(3)}},
}


@pytest.mark.parametrize("title", CONFIGS)
@pytest.mark.parametrize("by", ["folder", "file"])
def test_a_config_json_says_what_the_outputs_are(tmp_path, title, by):
    save_for_hf(network(), tmp_path / "m", model_args=RESNET)
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | CONFIGS[title]))
    if by == "folder":
        model = build_model(f"local-dir:{tmp_path}/m", weights="pretrained")
    else:
        weights = next(path for path in (tmp_path / "m").iterdir() if path != file)
        model = build_model("resnet18", None, RESNET, str(weights))
        if title == "timm's descriptions":
            assert known_classes(model).schemes == (["n3", "n2", "n1"],)
            return
    assert positions(model) == ([0, 1, 2] if title == "nobody's" else [2, 1, 0])
    assert bool(known_classes(model).schemes) == (title != "nobody's")


@pytest.mark.parametrize(
    "beside",
    [
        {"class_to_idx": TO},
        {"idx_to_class": AT},
        {"classes": REVERSED},
        {"classes": 3, "meta": {"CLASSES": tuple(REVERSED)}},
        {"meta": {"dataset_meta": {"classes": REVERSED}}},
        {"hyper_parameters": {"class_names": REVERSED}},
    ],
)
def test_a_checkpoint_says_what_its_outputs_are(tmp_path, beside):
    torch.save({"state_dict": network().state_dict()} | beside, tmp_path / "w.pth")
    assert positions(build_model("resnet18", None, RESNET, str(tmp_path / "w.pth"))) == [2, 1, 0]
    # a classifier of other classes starts anew, and has no names
    assert known_classes(build_model("resnet18", 4, RESNET, str(tmp_path / "w.pth"))).schemes == ()


def test_a_card_beside_a_pth_says_what_its_outputs_are(tmp_path):
    torch.save({"state_dict": network().state_dict(), "classes": NAMES}, tmp_path / "w.pth")
    (tmp_path / "w.json").write_text(json.dumps({"architecture": "resnet18", "num_classes": 3, "classes": REVERSED}))
    model = build_model("resnet18", None, RESNET, str(tmp_path / "w.pth"))
    assert positions(model) == [0, 1, 2]
    torch.save(network().state_dict(), tmp_path / "w.pth")
    assert positions(build_model("resnet18", None, RESNET, str(tmp_path / "w.pth"))) == [2, 1, 0]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({"0": "ant", "2": "cat"}, r"has 2 names of classes, and none for class 1"),
        ({"1": "ant", "2": "bee", "3": "cat"}, r"none for class 0: they count from 0"),
        (["ant", "bee"], r"has 2 names of classes, for 3 classes"),
        (["ant", "ant", "bee"], r"have 'ant' more than once"),
        ([None, "bee", "cat"], r"has None as the name of a class"),
        (3, r"is 3: it must be a list of names"),
        ("abc", r"is 'abc': it must be a list of names"),
    ],
)
def test_names_that_are_no_list_of_the_classes_are_named(tmp_path, names, words, capsys):
    save_for_hf(network(), tmp_path / "m", model_args=RESNET)
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"label_names": names}))
    with pytest.raises(UserError, match=words) as error:
        known_classes(build_model(f"local-dir:{tmp_path}/m", weights="pretrained"))
    assert "\n" not in str(error.value)
    # beside a file of weights they may be another model's: they are not used, which is said
    torch.save(network().state_dict(), tmp_path / "m" / "w.pth")
    capsys.readouterr()
    model = build_model("resnet18", None, RESNET, str(tmp_path / "m" / "w.pth"))
    said = capsys.readouterr().out
    if isinstance(names, list | dict) and "more than once" not in words:
        assert known_classes(model).schemes == () and said.count("config.json are not used: ") == 1


def test_imagenets_names_in_a_file_are_its_numbers_too():
    info = ImageNetInfo("imagenet-1k")
    model = timm.create_model("resnet18", **RESNET)
    for names in (info.label_names(), [info.index_to_description(place) for place in range(1000)]):
        model.pretrained_cfg = {"label_names": {str(place): name for place, name in enumerate(names)}}
        matched = match_classes(known_classes(model), 1000, info.label_names(), "MODEL", "DATA")
        assert matched.same_order and matched.notice is None
