"""Every verb takes every source that training takes, and the commands that a run prints next can be typed."""

import csv
import json
import os
import shlex
import shutil
import tarfile
from pathlib import Path

import pytest
import tiny_run
from forking import forked
from image_fixtures import make_dataset
from launching import ROOT
from PIL import Image
from source_fixtures import example, needs_datasets, write_records

from scalekd_ds.commands import evaluate, inspect, prepare_data
from scalekd_ds.commands.doctor import required_paths
from scalekd_ds.inspection.images import find_images

pytestmark = pytest.mark.usefixtures("one_thread")


def files_of(data: Path, split: str) -> list[tuple[Path, str]]:
    return [(path, path.parent.name) for path in sorted((data / split).rglob("*.jpg"))]


def folders(data, place):
    shutil.copytree(data, place)
    return "train", "val"


def other_folders(data, place):
    for split, name in (("train", "images/learn"), ("val", "images/test")):
        shutil.copytree(data / split, place / name)
    return "images/learn", "images/test"


def tables(data, place):
    shutil.copytree(data, place)
    for split in ("train", "val"):
        with open(place / f"{split}.csv", "w", newline="") as file:
            rows = [(path.relative_to(data), label) for path, label in files_of(data, split)]
            csv.writer(file).writerows([("path", "label"), *rows])
    return "train.csv", "val.csv"


def tars(data, place):
    place.mkdir()
    for split in ("train", "val"):
        with tarfile.open(place / f"{split}-000.tar", "w") as archive:
            for path, label in files_of(data, split):
                archive.add(path, f"{label}/{path.name}")
    return "train-{000..000}.tar", "val-{000..000}.tar"


def folder_of_tars(data, place):
    tars(data, place)
    for split in ("train", "val"):
        (place / split).mkdir()
        os.replace(place / f"{split}-000.tar", place / split / "000.tar")
    return "train", "val"


def tfrecords(data, place):
    place.mkdir()
    for split in ("train", "val"):
        records = [
            example(image__encoded=path.read_bytes(), image__class__synset=label.encode(), image__class__label=1)
            for path, label in files_of(data, split)
        ]
        write_records(place / f"{split}.tfrecord", records)
    return "train.tfrecord", "val.tfrecord"


def hub(data, place):
    import datasets

    names = ["class_0", "class_1", "class_2"]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    splits = {}
    for split in ("train", "val"):
        files = files_of(data, split)
        rows = {"image": [{"bytes": p.read_bytes(), "path": None} for p, _ in files], "label": [n for _, n in files]}
        splits[split] = datasets.Dataset.from_dict(rows, features)
    datasets.DatasetDict(splits).save_to_disk(place)
    return f"hf:{place}:train", f"hf:{place}:val"


KINDS = [
    folders,
    tars,
    *(pytest.param(kind, marks=pytest.mark.slow) for kind in (other_folders, tables, folder_of_tars)),
    pytest.param(tfrecords, marks=[pytest.mark.slow, pytest.mark.filterwarnings("ignore")]),
    pytest.param(hub, marks=needs_datasets),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"), train=24, val=9, classes=3, size=(32, 32))


@pytest.mark.parametrize("write", KINDS)
def test_the_commands_that_a_run_prints_next_work(tmp_path, data, write, capsys, monkeypatch):
    place = tmp_path / "a folder"
    train, val = write(data, place)
    root = ["--data.root", place] if write is not hub else []
    run = tiny_run.supervised_arguments(place, tmp_path / "run", "--data.train", train, "--data.val", val)
    run = [*run[:2], *root, *run[4:], "--student_kwargs", json.dumps(tiny_run.RESNET), "--schedule.epochs", 1]
    done = forked(ROOT / "launch" / "train.py", *run)
    assert done.returncode == 0, done.stdout + done.stderr
    top1 = json.loads((tmp_path / "run" / "results.json").read_text())["top1"]
    printed = [line.split("next", 1)[-1].strip() for line in done.stdout.splitlines() if "scalekd " in line]
    commands = [shlex.split(line[line.index("scalekd ") :]) for line in printed]
    assert [command[:2] for command in commands] == [["scalekd", "evaluate"]], done.stdout
    monkeypatch.chdir(tmp_path)
    evaluate.main(commands[0][2:])
    assert f"top-1 {top1:.2f}%" in capsys.readouterr().out
    # what training takes as validation, the other verbs take
    where = val if val.startswith("hf:") else str(place / val)
    evaluate.main([str(tmp_path / "run" / "student.safetensors"), "--data", where])
    assert f"top-1 {top1:.2f}%" in capsys.readouterr().out
    # and so are a run and its checkpoint, wherever a model is
    for model in (tmp_path / "run", next((tmp_path / "run" / "checkpoints").glob("step*"))):
        evaluate.main([f"{model}/", "--data", where])
        assert f"top-1 {top1:.2f}%" in capsys.readouterr().out
    inspect.main([str(tmp_path / "run"), where, "--out", str(tmp_path / "sheet.png"), "--images", "3"])
    text = capsys.readouterr().out
    assert "wrote" in text and "3 of 9 images" in text and "of 3 shown right" in text
    assert Image.open(tmp_path / "sheet.png").size[0] > 300
    prepare_data.main(["verify", where])
    assert "0 of 9 images cannot be used" in capsys.readouterr().out
    paths, _ = required_paths([str(word) for word in run])
    files = {str(place / name.replace("{000..000}", "000")) for name in (train, val) if not name.startswith("hf:")}
    assert set(paths.values()) == files


def test_the_doctor_looks_for_the_first_and_the_last_shard(tmp_path):
    run = ["--data.root", str(tmp_path), "--data.train", "t-{000..012}.tar", "--data.val", "val"]
    paths, _ = required_paths(run)
    assert paths == {
        "data.train (first)": f"{tmp_path}/t-000.tar",
        "data.train (last)": f"{tmp_path}/t-012.tar",
        "data.val": f"{tmp_path}/val",
    }


def test_a_quoted_glob_of_class_folders_is_what_a_shell_makes_of_it(data):
    folders = sorted((data / "val").iterdir())
    assert find_images([f"{data}/val/*"]) == find_images(list(map(str, folders)))
    assert len(find_images([f"{data}/val/class_[01]"])) == 6
