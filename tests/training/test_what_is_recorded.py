"""What a checkpoint records of the images, the teacher and the packages, by which a run that goes on sees what has changed."""

import pytest
import timm
import tiny_run
from image_fixtures import make_dataset
from PIL import Image

from scalekd_ds.config import RunConfig
from scalekd_ds.data.sources.image_folder import index_folder
from scalekd_ds.errors import UserError
from scalekd_ds.teacher import Teacher
from scalekd_ds.training.changes import (
    check_teacher,
    images_change,
    images_record,
    input_changes,
    package_versions,
    teacher_record,
    version_changes,
)


def test_files_that_were_replaced_under_their_names_are_seen(tmp_path):
    make_dataset(tmp_path, train=60, val=3, classes=3, size=(32, 32))
    before = images_record(index_folder(tmp_path / "train", "data.train"))
    assert images_change(before, images_record(index_folder(tmp_path / "train", "data.train")), "data.train") is None
    for path in (tmp_path / "train").rglob("*.jpg"):
        Image.open(path).resize((16, 16)).save(path)
    now = images_record(index_folder(tmp_path / "train", "data.train"))
    assert "the files hold other bytes" in images_change(before, now, "data.train")
    # a checkpoint of an earlier release
    del before["files"]
    assert images_change(before, now, "data.train") is None


def test_a_teacher_of_other_statistics_or_another_mean_is_another_one():
    model = timm.create_model("resnet18", num_classes=3, **tiny_run.RESNET)
    before, config = teacher_record(Teacher(model, features=False)), RunConfig()
    check_teacher(before, teacher_record(Teacher(model, features=False)), config.as_dict(), config)
    model.bn1.running_mean += 1.0
    now = teacher_record(Teacher(model, features=False))
    with pytest.raises(UserError, match="the teacher's weights are not those that the checkpoint was trained with"):
        check_teacher(before, now, config.as_dict(), config)
    # a checkpoint of an earlier release knows the parameters alone
    check_teacher({"teacher_digest": before["teacher_digest"]}, now, config.as_dict(), config)
    check_teacher(teacher_record(None), now, config.as_dict(), config)
    inputs = {"teacher": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (line,) = input_changes(inputs, {"teacher": {"mean": [0.0] * 3, "std": [1.0] * 3}})
    assert line.startswith('the teacher\'s images are normalised with {"mean": [0.0, 0.0, 0.0], "std"')
    assert input_changes(None, inputs) == input_changes(inputs, inputs) == []


def test_a_package_that_is_gone_is_said():
    assert version_changes(package_versions()) is None and version_changes(None) is None
    assert "nothing-here is not installed (was 1)" in version_changes(package_versions() | {"nothing-here": "1"})
