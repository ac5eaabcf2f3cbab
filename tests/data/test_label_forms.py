"""The forms in which other programs write labels: each is read as it is meant, or named in one line."""

import json
import shutil
import struct
from types import SimpleNamespace

import pytest
from source_fixtures import (
    JPEGS,
    example,
    labelled,
    message,
    needs_datasets,
    needs_pyarrow,
    write_records,
    write_table,
    write_tar,
)

from scalekd_ds.commands import prepare_data
from scalekd_ds.config import DataConfig, RunConfig
from scalekd_ds.data.run_sources import read_sources
from scalekd_ds.data.sources.open import open_source
from scalekd_ds.evaluation.standalone import images_for
from scalekd_ds.inspection.images import find_images

NUMBERS = [str(i) for i in range(12)]


def with_json(texts):
    return [
        (f"{i:02d}.{kind}", data) for i, text in enumerate(texts) for kind, data in (("jpg", JPEGS[0]), ("json", text))
    ]


def meaning(source):
    return [source.classes[label] for label in source.labels.tolist()]


# how a program writes the numbers 0 to 11
FORMS = {
    "plain": "{}",
    "padded": "{:02d}",
    "with a gap in its column": "{}.0",
    "with a newline": "{}\n",
    "of Windows": "{}\r\n",
    "with a mark of the byte order": "\ufeff{}",
}


@pytest.mark.parametrize("form", FORMS)
def test_numbers_are_numbers_however_they_are_written(tmp_path, form):
    """Taken as names, 10.0 would come before 2.0, and every label behind it mean another class."""
    texts = [FORMS[form].format(i) for i in range(12)]
    source = open_source(write_tar(tmp_path / "t.tar", labelled(texts)), "data.train")
    assert source.classes == NUMBERS and meaning(source) == NUMBERS
    if form == "with a mark of the byte order":
        return
    place = tmp_path / "table"
    place.mkdir()
    source = open_source(write_table(place, [(f"{i}.jpg", t.strip()) for i, t in enumerate(texts)]), "data.train")
    assert source.classes == NUMBERS and meaning(source) == NUMBERS


def test_numbers_with_a_gap_are_positions_in_a_models_classes(tmp_path, capsys):
    model = SimpleNamespace(num_classes=12, pretrained_cfg={"label_names": [f"c{i}" for i in reversed(range(12))]})
    tar = write_tar(tmp_path / "t.tar", labelled([f"{i}.0" for i in range(12)]))
    assert images_for(model, "MODEL", tar).labels.tolist() == list(range(12))
    assert "are numbers: they are positions in the classes of MODEL (0 is 'c11')" in capsys.readouterr().out
    assert [image.parent.name for image in find_images([str(tar)])] == NUMBERS
    padded = write_tar(tmp_path / "p.tar", labelled([f"{i:02d}" for i in range(12)]))
    assert images_for(model, "MODEL", padded).labels.tolist() == list(range(12))
    # unless the model knows them as names
    model.pretrained_cfg["label_names"] = [f"{i:02d}" for i in reversed(range(12))]
    assert images_for(model, "MODEL", padded).labels.tolist() == list(reversed(range(12)))
    # a date is a number that is no position
    dates = write_tar(tmp_path / "d.tar", [(f"{day}/0.jpg", JPEGS[0]) for day in (20240131, 99991231235959)])
    assert [image.parent.name for image in find_images([str(dates)])] == ["20240131", "99991231235959"]
    # where numbers with a point are the names, they are these
    (tmp_path / "classes.txt").write_text("1.0\n0.0\n2.0\n")
    tar = write_tar(tmp_path / "t.tar", labelled(["0.0", "1.0", "2.0"]))
    assert meaning(open_source(tar, "data.train")) == ["0.0", "1.0", "2.0"]


@pytest.mark.parametrize("kind", ["folders", "tar", "table"])
def test_one_class_is_enough_to_evaluate_and_to_verify(tmp_path, kind):
    (tmp_path / "v" / "b").mkdir(parents=True)
    (tmp_path / "v" / "b" / "0.jpg").write_bytes(JPEGS[0])
    where = {
        "folders": lambda: tmp_path / "v",
        "tar": lambda: write_tar(tmp_path / "t.tar", [("b/0.jpg", JPEGS[0])]),
        "table": lambda: write_table(tmp_path, [("v/b/0.jpg", "b")]),
    }[kind]()
    model = SimpleNamespace(num_classes=3, pretrained_cfg={"label_names": ["a", "b", "c"]})
    source = images_for(model, "MODEL", where)
    assert source.labels.tolist() == [1] and source.classes == ["a", "b", "c"]
    prepare_data.main(["verify", str(where)])
    assert "has one class, 'b': a classifier needs two or more" in message(where)


def test_numbers_of_a_json_and_of_typed_columns(tmp_path):
    texts = [b'{"label": %d.0}' % i for i in range(12)]
    texts[3] = b'\xef\xbb\xbf{"cls": "3", "class": "a name", "label": 3}'
    assert meaning(open_source(write_tar(tmp_path / "t.tar", with_json(texts)), "data.train")) == NUMBERS
    # a caption of any length may stand beside the label
    texts[5] = json.dumps({"text": "x" * 200_000, "label": 5}).encode()
    assert meaning(open_source(write_tar(tmp_path / "t.tar", with_json(texts)), "data.train")) == NUMBERS


@needs_pyarrow
def test_typed_columns_of_a_parquet(tmp_path):
    import pyarrow
    from pyarrow import parquet

    def table(labels, paths=None):
        for i in range(len(labels)):
            (tmp_path / f"{i}.jpg").write_bytes(JPEGS[0])
        columns = {"path": paths or [f"{i}.jpg" for i in range(len(labels))], "label": labels}
        parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
        return tmp_path / "t.parquet"

    for labels in (list(map(float, range(12))), pyarrow.array(range(12), pyarrow.uint8())):
        assert meaning(open_source(table(labels), "data.train")) == NUMBERS
    assert "row 2, has no label for '1.jpg'" in message(table(pyarrow.array([0.0, float("nan")])))
    assert "row 1, has the label [0]: it must be a number or a name" in message(table([[0], [1]]))
    images = [{"bytes": b"", "path": f"{i}.jpg"} for i in range(2)]
    assert "must be a path; a data set of Hugging Face is given as hf:FOLDER" in message(table([0, 1], images))
    parquet.write_table(
        pyarrow.table([["0.jpg", "1.jpg"], [0, 1], [1, 0]], ["path", "label", "label"]), tmp_path / "t.parquet"
    )
    assert "has 2 columns 'label': keep one of them" in message(tmp_path / "t.parquet")


def test_a_table_with_a_column_twice_or_no_file_is_named(tmp_path):
    (tmp_path / "t.csv").write_text("path,label,label\n0.jpg,cat,0\n1.jpg,dog,1\n")
    assert "has 2 columns 'label': keep one of them" in message(tmp_path / "t.csv")
    (tmp_path / "t.csv").write_text("path,label\nimages\\0.jpg,cat\nimages\\1.jpg,dog\n")
    assert "none of the 2 files" in (text := message(tmp_path / "t.csv")) and r"such as 'images\\0.jpg'" in text


@pytest.mark.parametrize(
    ("label", "says"),
    [
        (struct.pack("<q", 3), "which is no text: write the number or the name"),
        ("cat".encode("utf-16"), "which is no text"),
        (b"0\0", "which is no text"),
        (b"9" * 5000, None),
    ],
)
def test_what_is_no_label_is_no_class(tmp_path, label, says):
    tar = write_tar(tmp_path / "t.tar", [("0.jpg", JPEGS[0]), ("0.cls", label), ("1.jpg", JPEGS[1]), ("1.cls", b"1")])
    if says is None:
        # so many digits are no position, and a name as any other
        assert len(open_source(tar, "data.train").classes) == 2
    else:
        assert says in (text := message(tar)) and "'0.jpg'" in text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b'{"label": [3]}', "'00.json' in .* has the label [3]: it must be a number or a name"),
        (b'{"label": 0.5}', "has the label 0.5: it must be"),
        (b'{"label": null}', "has the label None: it must be"),
        (b'{"label": NaN}', "has the label nan: it must be"),
        (b'{"label": 3, "cls": 1}', "two labels for one sample, '3' (label in '00.json') and '1' (cls in '00.json')"),
        (
            b'{"label": "cat", "class": "dog"}',
            "'cat' (label in '00.json') and 'dog' (class in '00.json'), which differ",
        ),
        (b'{"label": ', "'00.json' in .* is no JSON"),
        (b'{"name": "cat"}', "'00.jpg' in .* has no label"),
        (b"[3]", "'00.jpg' in .* has no label"),
    ],
)
def test_a_json_without_one_label_says_why(tmp_path, text, says):
    found = message(write_tar(tmp_path / "t.tar", with_json([text, b'{"label": 1}'])))
    for part in says.split(" in .* "):
        assert part in found


@pytest.mark.parametrize("json", [b"{}", b'{"caption": "a cat"}', b"[1, 2]", b""])
def test_captions_in_class_folders_of_a_tar_are_no_labels(tmp_path, json, capsys):
    members = [("a/0.jpg", JPEGS[0]), ("a/0.json", json), ("b/1.jpg", JPEGS[1]), ("dataset.json", b'{"labels": []}')]
    tar = write_tar(tmp_path / "t.tar", members)
    for _ in range(2):
        assert meaning(open_source(tar, "data.train")) == ["a", "b"]
        assert "2 files of other kinds (.json)" in capsys.readouterr().out


@pytest.mark.parametrize("names", [["1", "2", "3"], ["01", "02", "03"], ["7", "100", "20"]])
def test_folders_with_numbers_as_names_are_classes_in_a_tar_as_well(tmp_path, names):
    """Oxford's flowers are in folders 1 to 102."""
    members = [(f"{name}/x.jpg", JPEGS[i]) for i, name in enumerate(names)]
    for name, data in members:
        (tmp_path / "train" / name).parent.mkdir(parents=True)
        (tmp_path / "train" / name).write_bytes(data)
    write_tar(tmp_path / "val.tar", members)
    folders = open_source(tmp_path / "train", "data.train")
    for _ in range(2):
        source = open_source(tmp_path / "val.tar", "data.val")
        assert source.classes == folders.classes == sorted(names) and meaning(source) == names
    _, val = read_sources(RunConfig(data=DataConfig(root=str(tmp_path), val="val.tar")))
    assert meaning(val) == names
    # another number is another name, and no position
    write_tar(tmp_path / "val.tar", [("0/x.jpg", JPEGS[0]), *members[1:]])
    assert "has 1 classes that the list of 3 classes lacks (0)" in message(
        tmp_path / "val.tar", classes=folders.classes
    )


def test_folders_in_class_folders_of_a_tar_are_not_taken_for_classes(tmp_path):
    tar = write_tar(tmp_path / "t.tar", [("a/0.jpg", JPEGS[0]), ("a/deep/er/1.jpg", JPEGS[1]), ("b/2.jpg", JPEGS[2])])
    assert "has images in the folder 'a' and in 'a/deep/er'" in message(tar)
    tar = write_tar(tmp_path / "t.tar", [("./train/a/0.jpg", JPEGS[0]), ("train/b/2.jpg", JPEGS[2])])
    assert open_source(tar, "data.train").classes == ["a", "b"]


def test_dots_beside_something_about_a_part_of_the_names(tmp_path):
    members = [
        ("v1.2.jpg", JPEGS[0]),
        ("v1.2.cls", b"0"),
        ("v1.3.jpg", JPEGS[1]),
        ("v1.3.cls", b"1"),
        ("v1.json", b"{}"),
    ]
    assert meaning(open_source(write_tar(tmp_path / "t.tar", members), "data.train")) == ["0", "1"]


def test_labels_of_several_classes_are_refused(tmp_path):
    tar = write_tar(tmp_path / "t.tar", labelled([[0], [1, 4], [0, 4, 7]]))
    assert "'0000.jpg' in" in (text := message(tar)) and "has the label [0], a list: an image has one label" in text
    # a name may look like one
    assert meaning(open_source(write_tar(tar, labelled(["[0]", "a"])), "data.train")) == ["[0]", "a"]


def test_a_tfrecord_with_empty_synsets_has_its_numbers(tmp_path):
    records = [example(image__encoded=JPEGS[i], image__class__label=i, image__class__synset=b"") for i in range(2)]
    assert meaning(open_source(write_records(tmp_path / "t.tfrecord", records), "data.train")) == ["0", "1"]


@pytest.mark.parametrize("files", [1, 2])
def test_records_of_which_some_have_a_synset_are_refused(tmp_path, files):
    records = [example(image__encoded=JPEGS[i], image__class__label=i) for i in range(2)]
    records += [
        example(image__encoded=JPEGS[i], image__class__label=i, image__class__synset=b"n%d" % i) for i in range(2)
    ]
    for number in range(files):
        share = len(records) // files
        write_records(tmp_path / f"{number}.tfrecord", records[number * share : (number + 1) * share])
    assert "has its class as a synset, and record 0 of" in message(tmp_path)


@needs_datasets
def test_a_set_of_hugging_face_without_rows_is_named(tmp_path):
    from datasets import ClassLabel, Dataset, Features, Image

    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    Dataset.from_dict({"image": [], "label": []}, features=features).save_to_disk(tmp_path / "set")
    assert message(f"hf:{tmp_path / 'set'}").endswith("has no rows.")


@needs_datasets
def test_labels_of_hugging_face(tmp_path, capsys):
    from datasets import ClassLabel, Dataset, Features, Image, Value

    def where(labels, kind, **columns):
        shutil.rmtree(tmp_path / "d", ignore_errors=True)
        images = [{"bytes": JPEGS[i % 6], "path": None} for i in range(len(labels))]
        others = {name: values for name, (values, _) in columns.items()}
        features = Features({"img": Image(), "label": kind} | {name: feature for name, (_, feature) in columns.items()})
        Dataset.from_dict({"img": images, "label": labels} | others, features).save_to_disk(tmp_path / "d")
        return f"hf:{tmp_path}/d"

    assert meaning(open_source(where([float(i) for i in range(12)], Value("float32")), "data.train")) == NUMBERS
    named = ClassLabel(names=["a", "b"])
    assert "row 2, has the label -1, as a split without labels has" in message(where([0, 1, -1], named))
    assert "'row 1' in" in (text := message(where(["x", "", "y"], Value("string")))) and "has no label" in text
    capsys.readouterr()
    coarse = ([0, 0, 1], ClassLabel(names=["A", "B"]))
    assert meaning(open_source(where([0, 1, 1], named, cls=coarse), "data.train")) == ["a", "b", "b"]
    assert "are those of its column 'label', not of 'cls'" in capsys.readouterr().out
    assert "no split 'train[:1]': add one of :train" in message(f"hf:{_folder(tmp_path)}:train[:1]")
    # the folder without `hf:` in front
    assert f"is given as hf:{tmp_path}/d" in message(tmp_path / "d")


def _folder(place):
    for name in ("a", "b"):
        (place / "folder" / "train" / name).mkdir(parents=True)
        (place / "folder" / "train" / name / "0.jpg").write_bytes(JPEGS[0])
    return place / "folder"


def test_folders_of_a_tar_that_are_named_like_fractions_are_names(tmp_path):
    tar = write_tar(tmp_path / "t.tar", [("1.0/0.jpg", JPEGS[0]), ("2.0/1.jpg", JPEGS[1])])
    assert meaning(open_source(tar, "data.train")) == ["1.0", "2.0"]
    assert len(find_images([str(tar)])) == 2
