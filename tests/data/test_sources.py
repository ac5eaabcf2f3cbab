"""Every kind of source on real files, against what was written."""

import itertools
import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from image_fixtures import make_folder
from source_fixtures import (
    JPEGS,
    SHAPES,
    example,
    labelled,
    message,
    needs_datasets,
    needs_pyarrow,
    write_records,
    write_table,
    write_tar,
)

from scalekd_ds.data.reader import Reader
from scalekd_ds.data.sources.image_folder import ImageFolder, index_folder
from scalekd_ds.data.sources.index import SUFFIX
from scalekd_ds.data.sources.open import open_source
from scalekd_ds.data.sources.source import check_all_present, per_class, subset
from scalekd_ds.data.sources.tfrecord import _scan
from scalekd_ds.errors import UserError


def assert_whole(source, encoded, labels, shapes):
    """All that a source offers, against what was written."""
    assert len(source) == len(labels)
    assert source.labels.dtype == np.int64 and source.labels.tolist() == labels
    reader = Reader(source, keep_bytes=0)
    assert [reader.size(i, reader.encoded(i)) for i in range(len(source))] == shapes
    for i, data in enumerate(encoded):
        assert source.read(i).dtype == np.uint8 and source.read(i).tobytes() == data
    assert len({source.name(i) for i in range(len(source))}) == len(source)
    picked = source.select([3, 1])
    assert type(picked) is type(source) and picked.classes == source.classes
    assert picked.labels.tolist() == [labels[3], labels[1]]
    assert picked.name(0) == source.name(3) and picked.read(1).tobytes() == encoded[1]


def test_a_folder_of_class_folders_gives_its_files_and_classes(tmp_path):
    for i, place in enumerate(("a/x.jpg", "a/deep/y.jpg", "b/u.JPEG", "b/v.jpg", "b/w.jpg", "c/z.jpg")):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_bytes(JPEGS[i])
    (tmp_path / "b" / "notes.txt").write_text("no image")
    source = open_source(tmp_path, "data.train")
    again = open_source(str(tmp_path), "data.train")
    order = [0, 1, 2, 3, 4, 5]
    assert [os.path.relpath(p, tmp_path) for p in source.paths] == [
        "a/x.jpg",
        "a/deep/y.jpg",
        *("b/u.JPEG", "b/v.jpg", "b/w.jpg", "c/z.jpg"),
    ]
    for each in (source, again, index_folder(tmp_path, "data.train")):
        assert each.classes == ["a", "b", "c"]
        assert_whole(each, [JPEGS[i] for i in order], [0, 0, 1, 1, 1, 2], SHAPES)
    assert (tmp_path / SUFFIX).is_file()
    half = subset(source, 3, seed=1)
    assert isinstance(half, ImageFolder) and set(half.paths) < set(source.paths)


def test_validation_has_the_classes_of_training(tmp_path):
    train = index_folder(make_folder(tmp_path / "train", {"a": 1, "b": 1, "c": 1}), "data.train")
    val = open_source(make_folder(tmp_path / "val", {"a": 1, "c": 2}), "data.val", classes=train.classes)
    assert val.classes == train.classes and val.labels.tolist() == [0, 2, 2]
    with pytest.raises(UserError, match=r"has no image of 1 of the 3 classes, the first 'b'.* what allows it"):
        check_all_present(val, "data.val", "what allows it")
    make_folder(tmp_path / "odd", {"a": 1, "d": 1})
    assert "1 class folders of" in message(tmp_path / "odd", classes=train.classes)
    assert "(d)" in message(tmp_path / "odd", classes=train.classes)


def test_tars_are_labelled_by_cls_by_json_or_by_folders(tmp_path):
    write_tar(tmp_path / "s-000.tar", labelled([1, 0, 2]))
    write_tar(
        tmp_path / "s-001.tar",
        [
            ("x/5.json", json.dumps({"label": 2, "text": "a"}).encode()),
            ("x/5.png.txt", b"ignored"),
            ("x/5.jpg", JPEGS[3]),
            ("x/6.jpg", JPEGS[4]),
            ("x/6.cls", b" 0\n"),
        ],
    )
    for where in (tmp_path, tmp_path / "s-{000..001}.tar"):
        source = open_source(where, "data.train")
        assert source.classes == ["0", "1", "2"]
        assert_whole(source, JPEGS[:5], [1, 0, 2, 2, 0], SHAPES[:5])
        assert source.name(3) == f"{tmp_path}/s-001.tar:x/5.jpg"
    (tmp_path / "classes.txt").write_text("cat\ndog\nfox\nowl\n")
    assert open_source(tmp_path, "data.train").classes == ["cat", "dog", "fox", "owl"]
    (tmp_path / "by_name").mkdir()
    members = [(f"train/{'ba'[i % 2]}/{i}.v1.jpg", JPEGS[i]) for i in range(4)]
    source = open_source(write_tar(tmp_path / "by_name" / "only.tar", members), "data.train")
    assert source.classes == ["a", "b"]
    assert_whole(source, JPEGS[:4], [1, 0, 1, 0], SHAPES[:4])


@pytest.mark.parametrize("kind", ["csv", "tsv", pytest.param("parquet", marks=needs_pyarrow)])
def test_tables_of_every_format_give_their_files_and_classes(tmp_path, kind):
    rows = [
        (f"{i // 2}/{i}, of 6.jpg" if kind != "csv" else f"{i // 2}/{i}.jpg", "dog cat".split()[i % 2])
        for i in range(6)
    ]
    for i, (path, _) in enumerate(rows):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(JPEGS[i])
    if kind == "parquet":
        import pyarrow
        from pyarrow import parquet

        columns = {"path": [path for path, _ in rows], "id": list(range(6)), "label": [label for _, label in rows]}
        table = tmp_path / "table.parquet"
        parquet.write_table(pyarrow.table(columns), table)
    else:
        table = write_table(tmp_path, rows, f"table.{kind}", "\t" if kind == "tsv" else ",")
    for _ in range(2):
        source = open_source(table, "data.train")
        assert source.classes == ["cat", "dog"]
        assert_whole(source, JPEGS, [1, 0] * 3, SHAPES)
    assert open_source(table, "data.train", classes=["dog", "cat", "eel"]).labels.tolist() == [0, 1] * 3
    (tmp_path / "tables").mkdir()
    moved = shutil.move(table, tmp_path / "tables" / table.name)
    assert_whole(open_source(moved, "data.train", root=tmp_path), JPEGS, [1, 0] * 3, SHAPES)
    assert "exists below" in message(moved)


@needs_datasets
def test_hugging_face_data_sets_are_read_offline(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"image": [{"bytes": data, "path": None} for data in JPEGS], "label": [1, 0, 1, 0, 0, 1]}
    made = datasets.Dataset.from_dict(rows, features)
    made.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": made, "test": made.select([0, 1])}).save_to_disk(tmp_path / "splits")
    (tmp_path / "files").mkdir()
    made.to_parquet(tmp_path / "files" / "train.parquet")
    for where in (f"hf:{tmp_path}/saved", f"hf:{tmp_path}/splits:train", f"hf:{tmp_path}/files:train"):
        source = open_source(where, "data.train")
        assert source.classes == ["cat", "dog"]
        assert_whole(source, JPEGS, rows["label"], SHAPES)
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda i: source.read(i % 6).tobytes(), range(200)))
    assert read == [JPEGS[i % 6] for i in range(200)]
    make_folder(tmp_path / "folder", {"a": 2, "b": 2})
    source = open_source(f"hf:{tmp_path}/folder", "data.train")
    assert source.classes == ["a", "b"] and source.labels.tolist() == [0, 0, 1, 1]
    assert source.read(2).tobytes() == (tmp_path / "folder" / "b" / "000.jpg").read_bytes()
    assert "has several splits: add one of :train, :test" in message(f"hf:{tmp_path}/splits")
    assert "Did you mean 'train'?" in message(f"hf:{tmp_path}/splits:trian")
    assert "cannot be loaded" in message(f"hf:{tmp_path}/nowhere")
    made.remove_columns("image").save_to_disk(tmp_path / "blind")
    assert "has 0 columns of images" in message(f"hf:{tmp_path}/blind")
    made.remove_columns("label").save_to_disk(tmp_path / "mute")
    assert "has no column of labels" in message(f"hf:{tmp_path}/mute")


def test_without_datasets_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in message("hf:imagenet-1k:train")


def test_reading_is_safe_in_threads(tmp_path):
    source = open_source(write_tar(tmp_path / "s.tar", labelled([i % 2 for i in range(60)])), "data.train")
    opened = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda i: source.read(i % 60).tobytes(), range(600)))
    assert read == [JPEGS[i % 60 % 6] for i in range(600)]
    assert len(os.listdir("/proc/self/fd")) == opened


def records(labels, first=0):
    return [
        example(image__height=300, image__encoded=JPEGS[i], image__format=b"JPEG", image__class__label=label)
        for i, label in enumerate(labels, first)
    ]


def test_tfrecords_give_their_images_and_labels(tmp_path):
    write_records(tmp_path / "train-00000-of-00002", records([1, 0, 0]))
    write_records(tmp_path / "train-00001-of-00002", records([1, 0, 1], first=3))
    for where in (tmp_path, tmp_path / "train-{00000..00001}-of-00002"):
        source = open_source(where, "data.train")
        assert_whole(source, JPEGS, [1, 0, 0, 1, 0, 1], SHAPES)
        assert source.name(4) == f"{tmp_path}/train-00001-of-00002:record 1"
    (tmp_path / "named").mkdir()
    named = [
        example(image__class__label=i + 1, image__class__synset=b"n0%d" % (i % 3), image__encoded=JPEGS[i])
        for i in range(6)
    ]
    file = write_records(tmp_path / "named" / "a.tfrecord", named)
    source = open_source(file, "data.train")
    assert source.classes == ["n00", "n01", "n02"]
    assert_whole(source, JPEGS, [0, 1, 2] * 2, SHAPES)
    whole = file.read_bytes()
    for size in (len(whole) - 1, len(whole) - 900, 5):
        file.write_bytes(whole[:size])
        assert "is no tf.train.Example of an image" in message(file), size
    file.write_bytes(b"text" * 99)
    assert "record 0 of" in message(file) and "pass its end" in message(file)
    write_records(file, [*named, example(image__class__label=1)])
    assert "record 6 of" in message(file) and "it has no image/encoded" in message(file)
    write_records(file, [example(image__encoded=JPEGS[0])])
    assert "it has neither image/class/synset nor image/class/label" in message(file)


def test_dali_reads_the_same_tfrecords(tmp_path):
    from nvidia.dali import fn, pipeline_def, tfrecord

    path = write_records(tmp_path / "a.tfrecord", records([1, 0, 2, 300, -1, 2**40]))
    starts = np.cumsum([0, *(len(record) + 16 for record in records([1, 0, 2, 300, -1, 2**40]))])
    lines = [f"{start} {end - start}" for start, end in itertools.pairwise(starts)]
    (tmp_path / "a.idx").write_text("\n".join(lines) + "\n")
    features = {
        "image/encoded": tfrecord.FixedLenFeature((), tfrecord.string, ""),
        "image/class/label": tfrecord.FixedLenFeature([1], tfrecord.int64, -9),
    }

    @pipeline_def(batch_size=6, num_threads=1, device_id=None)
    def read():
        out = fn.readers.tfrecord(path=str(path), index_path=str(tmp_path / "a.idx"), features=features)
        return out["image/encoded"], out["image/class/label"]

    images, labels = read().run()
    ours = _scan(str(path), "data.train", {})
    data = path.read_bytes()
    assert [int(sample.label) for sample in ours] == labels.as_array().ravel().tolist() == [1, 0, 2, 300, -1, 2**40]
    assert [data[s.offset : s.offset + s.length] for s in ours] == [images.at(i).tobytes() for i in range(6)] == JPEGS


def test_a_choice_has_as_many_of_every_class(tmp_path):
    make_folder(tmp_path, {"a": 5, "b": 9, "c": 7})
    source = index_folder(tmp_path, "data.train")
    chosen = per_class(source, 4, seed=1)
    assert np.bincount(chosen.labels).tolist() == [4, 4, 4]
    assert chosen.paths == sorted(chosen.paths) and set(chosen.paths) <= set(source.paths)
    assert chosen.paths == per_class(source, 4, seed=1).paths != per_class(source, 4, seed=2).paths
    with pytest.raises(UserError, match=r"class 'a' of .* has 5 images"):
        per_class(source, 6, seed=1)
