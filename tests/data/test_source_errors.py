"""What can be wrong with the data of a source: one clear line each."""

import gzip

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

from scalekd_ds.data.sources.open import open_source


def test_a_tar_that_cannot_be_used_is_refused_with_the_reason(tmp_path):
    members = labelled([0, 1, 0, 1])
    where = tmp_path / "s.tar"

    def told(written, *args):
        write_tar(where, written)
        return message(where, *args)

    assert "'0003.jpg' in" in told(members[:-1]) and "has no label" in message(where)
    assert "has no label" in told([members[0], members[2]])
    assert "has no images" in told([("a.txt", b"x")])
    assert "has no images" in told([])
    assert "two images for one sample" in told([*members, ("0001.png", JPEGS[0])])
    assert "two images for one sample" in told([*members, members[0]])
    assert "for one sample, 'a/x.jpg' and 'a/x.jpg'" in told(
        [("a/x.jpg", JPEGS[0]), ("b/x.jpg", JPEGS[0]), ("a/x.jpg", JPEGS[1])]
    )
    assert "the label 7 of '0001.jpg'" in told(labelled([0, 7, 1]))
    assert "labels are 0 to 2" in message(where)
    # counted from 1
    assert "the label 2 of '0001.jpg'" in told(labelled([1, 2, 1, 2]))
    assert "the label -1 of" in told(labelled([0, -1, 1]))
    assert "the label 2 of '0002.jpg'" in told(labelled([0, 1, 2]), ["cat", "dog"])
    assert "1 classes that the list of 2 classes lacks (eel)" in told(labelled(["cat", "eel"]), ["cat", "dog"])
    assert "has one class" in told(labelled([0, 0]))
    assert "'0.json' in" in told([("0.jpg", JPEGS[0]), ("0.json", b"{")]) and "is no JSON" in message(where)
    whole = write_tar(where, members).read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    for size in (end, end - 300, len(whole) // 3 // 512 * 512, 700, 100):
        where.write_bytes(whole[:size])
        assert "cut off" in message(where) or "no whole, uncompressed tar" in message(where), size
    where.write_bytes(b"text" * 999)
    assert "no whole, uncompressed tar" in message(where)
    assert "s-001.tar' does not exist" in message(tmp_path / "s-{001..003}.tar")
    assert "must count up" in message(tmp_path / "s-{003..001}.tar")
    write_tar(where, members)
    (tmp_path / "classes.txt").write_text("cat\ncat\n")
    assert "names the class 'cat' more than once" in message(where)
    (tmp_path / "folder").mkdir()
    assert "both shards and folders" in message(tmp_path)


def test_a_table_that_cannot_be_used_is_refused_with_the_reason(tmp_path):
    good = [("t/0.jpg", 0), ("t/1.jpg", 1)]
    (tmp_path / "outside.jpg").write_bytes(JPEGS[0])
    root = tmp_path / "root"
    (root / "t").mkdir(parents=True)
    (root / "t" / "link.jpg").symlink_to(tmp_path / "outside.jpg")
    (root / "up").symlink_to(tmp_path)
    (root / "t" / "inside.jpg").symlink_to("0.jpg")

    def told(rows, *args):
        return message(write_table(root, [*good, *rows]), *args)

    for path in ("../outside.jpg", "t/../../outside.jpg", str(tmp_path / "outside.jpg"), str(root / "t" / "0.jpg")):
        assert f"row 3, has {path!r}: paths must stay below" in told([(path, 0)])
    for path in ("t/link.jpg", "up/outside.jpg"):
        assert f"has {path!r}, a link that leads out of" in told([(path, 0)])
    assert len(open_source(write_table(root, [*good, ("t/inside.jpg", 0)]), "data.train")) == 3
    assert "row 3, names 't/0.jpg' again" in told([("t/0.jpg", 0)])
    assert "row 3, names 't/./0.jpg' again" in told([("t/./0.jpg", 0)])
    assert "row 3, has no label for 't/2.jpg'" in told([("t/2.jpg", "")])
    assert "the label 9 of 't/2.jpg'" in told([("t/2.jpg", 9)])
    assert "the label 2 of 't/2.jpg'" in told([("t/2.jpg", 2)], ["cat", "dog"])
    table = root / "table.csv"
    for text, reason in (
        ("\n", "has no column 'path': it has none"),
        ("path,class\na.jpg,1\n", "has no column 'label': it has path, class"),
        ("path,label\n", "has no rows"),
        ("path,label\na.jpg,1,2\n", "line 2, has 3 fields"),
        ("path,label\na.jpg,0\nb.jpg,1\n", "none of the 2 files"),
    ):
        table.write_text(text)
        assert reason in message(table)
    table.write_bytes(b"path,label\n\xff\xfe,0\n")
    assert "is no text of UTF-8" in message(table)
    assert "does not exist. Did you mean 'table.csv'?" in message(root / "tables.csv")
    (root / "notes.docx").write_text("x")
    assert "is a file of no known kind" in message(root / "notes.docx")


@needs_pyarrow
def test_a_damaged_parquet_is_named(tmp_path):
    import pyarrow
    from pyarrow import parquet

    table = tmp_path / "t.parquet"
    parquet.write_table(pyarrow.table({"path": ["a.jpg", "b.jpg"], "label": [0, 1]}), table)
    whole = table.read_bytes()
    for data in (b"PAR1" + bytes(100), b"PAR1", whole[: len(whole) // 2], whole[:4] + bytes(30) + whole[34:]):
        table.write_bytes(data)
        assert "cannot be read as Parquet" in message(table)
    table.write_bytes(whole)
    assert "none of the 2 files" in message(table)
    parquet.write_table(pyarrow.table({"file": ["a.jpg"], "label": [0]}), table)
    assert "has no column 'path': it has file, label" in message(table)


def test_a_list_of_classes_beside_the_data_is_not_the_training_sets(tmp_path):
    tar = write_tar(tmp_path / "s.tar", labelled([0, 1, 2, 0]))
    (tmp_path / "classes.txt").write_text("fox\ncat\ndog\neel\n")
    source = open_source(tar, "data.val", classes=["cat", "dog", "fox"])
    assert source.classes == ["cat", "dog", "fox"] and source.labels.tolist() == [2, 0, 1, 2]
    assert "lacks (fox)" in message(tar, classes=["cat", "dog"])


ROWS = "path,label\na.jpg,cat\nb.jpg,dog\n"
# tables as spreadsheets, scripts and other people write them, and what each is told
TABLES_OF_OTHERS = {
    "semicolons": (ROWS.replace(",", ";"), "it has path;label, and must have path and label, with ',' and not ';'"),
    "tabs": (ROWS.replace(",", "\t"), r"it has path\tlabel, and must have path and label, with ',' and not '\t'"),
    "no header": (ROWS[11:], "it has a.jpg, cat, and must have path and label, which its first line names"),
    "a quote without an end": (ROWS.replace("cat", '"cat') + "c.jpg,eel\n", "line 4, cannot be split into columns"),
    "joined": (ROWS + ROWS.replace(".jpg", "2.jpg"), "line 4, has the names of the columns again"),
    "addresses": (ROWS.replace("a.jpg", "https://x.org/a.jpg"), "row 1, has 'https://x.org/a.jpg', an address"),
    "a bucket": (ROWS.replace("b.jpg", "s3://b/b.jpg"), "row 2, has 's3://b/b.jpg', an address"),
    "missing labels": (ROWS.replace("cat", "nan"), "row 1, has the label 'nan' for 'a.jpg', as programs write"),
    "a workbook": ("PK\3\4" + "\0" * 2000, r"it has PK\x03\x04\x00"),
}


@pytest.mark.parametrize("kind", TABLES_OF_OTHERS)
def test_a_table_of_another_form_is_told_which_is_wanted(tmp_path, kind):
    text, says = TABLES_OF_OTHERS[kind]
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(JPEGS[0])
    (tmp_path / "t.csv").write_text(text)
    found = message(tmp_path / "t.csv")
    assert says in found and len(found) < 500 and found.isprintable()


def test_blanks_beside_the_names_of_columns_are_no_part_of_them(tmp_path):
    (tmp_path / "a.jpg").write_bytes(JPEGS[0]), (tmp_path / "b.jpg").write_bytes(JPEGS[0])
    (tmp_path / "t.csv").write_text("path, label\na.jpg, cat\nb.jpg, dog\n")
    assert open_source(tmp_path / "t.csv", "data.train").classes == ["cat", "dog"]


@needs_pyarrow
def test_a_parquet_with_images_in_it_is_told_so(tmp_path):
    import pyarrow
    from pyarrow import parquet

    table = tmp_path / "t.parquet"
    parquet.write_table(pyarrow.table({"path": JPEGS[:2], "label": [0, 1]}), table)
    assert "row 1, has the path '" in (text := message(table)) and len(text) < 500
    parquet.write_table(pyarrow.table({"image": JPEGS[:2], "label": [0, 1]}), table)
    assert "it has image, label, and must have path and label; a data set of Hugging Face is given as hf:" in message(
        table
    )


@needs_datasets
def test_what_is_no_data_set_of_hugging_face_says_how_one_is_given(tmp_path):
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Image

    features = Features({"image": Image(mode="L"), "label": ClassLabel(names=["a", "b"])})
    rows = {"image": [{"bytes": data, "path": None} for data in JPEGS[:2]], "label": [0, 1]}
    data = Dataset.from_dict(rows, features=features)
    DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "saved")
    assert f"is given as hf:{tmp_path / 'saved'}" in message(tmp_path / "saved")
    # what grey pictures of colour ones would be is not what is trained
    assert "wants its images as L, and they are read as RGB" in message(f"hf:{tmp_path / 'saved'}:train")
    (tmp_path / "of_hub" / "data").mkdir(parents=True)
    data.to_parquet(tmp_path / "of_hub" / "data" / "train-0.parquet")
    assert f"is given as hf:{tmp_path / 'of_hub'}" in message(tmp_path / "of_hub")
    assert "is a file: a data set of Hugging Face is given as hf:FOLDER" in message(
        f"hf:{tmp_path / 'of_hub' / 'data' / 'train-0.parquet'}"
    )
    assert "'hf:' names no data set" in message("hf:")


def test_a_tar_says_what_is_beside_an_image_in_place_of_its_label(tmp_path):
    tar = tmp_path / "t.tar"
    for members, says in (
        ([("0.json", b'{"class_id": 3, "caption": "x"}')], "There is '0.json' with class_id, caption."),
        ([("0.txt", b"3"), ("0.cls2", b"3"), ("1.txt", b"1")], "There is '0.txt' and '0.cls2'."),
        ([], "or every image of the tar in a folder of its class."),
    ):
        assert message(write_tar(tar, [("0.jpg", JPEGS[0]), *members])).endswith(says)
    masks = [("0.jpg", JPEGS[0]), ("0.mask.png", JPEGS[0]), ("0.cls", b"0")]
    assert "or leave out what is no picture of the class, such as a mask" in message(write_tar(tar, masks))


def test_a_tar_of_training_and_validation_images_is_refused(tmp_path):
    members = [(f"{split}/{name}/0.jpg", JPEGS[0]) for split in ("train", "val") for name in "ab"]
    assert "has images of the class 'a' in 'train/a' and in 'val/a'" in message(write_tar(tmp_path / "t.tar", members))
    source = open_source(write_tar(tmp_path / "t.tar", members[:2]), "data.train")
    assert source.classes == ["a", "b"] and len(source) == 2


@pytest.mark.parametrize("pattern", ["*.tar", "t-{0..4..2}.tar", "{t,u}.tar", "t-{a..c}.tar", "t.tar::t.tar"])
def test_patterns_of_other_programs_are_told_which_there_are(tmp_path, pattern):
    write_tar(tmp_path / "t.tar", labelled([0, 1]))
    assert "does not exist. A pattern has ranges such as {000..012}; a folder of shards" in message(tmp_path / pattern)


def test_shards_in_capitals_and_with_kaggles_ending_are_shards(tmp_path):
    for name in ("a.tar", "B.TAR"):
        write_tar(tmp_path / name, labelled([0, 1]))
    assert len(open_source(tmp_path, "data.train")) == 4
    packed = tmp_path / "t.tar.gz"
    packed.write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    assert "t.tar.gz' is compressed (gzip): unpack it" in message(packed)
    (tmp_path / "train.zip").write_bytes(b"PK\3\4" + bytes(30))
    assert "train.zip' is compressed (zip): unpack it" in message(tmp_path / "train.zip")
    records = [example(image__encoded=JPEGS[i], image__class__label=i) for i in (0, 1)]
    for name in ("a.tfrec", "b.TFRECORD"):
        assert len(open_source(write_records(tmp_path / name, records), "data.train")) == 2
    other = write_records(tmp_path / "c.tfrec", [example(image=JPEGS[0], label=0)])
    assert "it has no image/encoded, but image, label" in message(other)
