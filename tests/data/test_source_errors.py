"""What can be wrong with the data of a source: one clear line each."""

from source_fixtures import JPEGS, labelled, message, needs_pyarrow, write_table, write_tar

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
