"""What is an image and what is not, by one rule for all sources; all that is left out is counted and said."""

import io
import os
import socket
import tarfile

import numpy as np
import pytest
from image_fixtures import make_folder
from source_fixtures import JPEGS, labelled, message, write_tar
from torchvision.datasets import ImageFolder as TorchvisionFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from scalekd_ds.data.reader import _is_dalis
from scalekd_ds.data.sources.open import open_source
from scalekd_ds.data.sources.what_counts import EXTENSIONS, say_left_out
from scalekd_ds.inspection.images import find_images

FOLDERS = (
    *(".ipynb_checkpoints", ".git", ".cache", "@eaDir", "__MACOSX", "lost+found", "$RECYCLE.BIN", "#recycle"),
    *("System Volume Information", ".snapshot", ".Trash-1000", "@Recycle", "__pycache__", "PaxHeaders"),
    *("Network Trash Folder", "Temporary Items", "TheVolumeSettingsFolder", "RECYCLER", "@tmp"),
)
HIDDEN = ("._000.jpg", ".hidden.png", ".000.jpg.Xy12ab", ".DS_Store")
OTHERS = {
    "000.jpg.part": ".part",
    "000.jpg.crdownload": ".crdownload",
    "000.jpg~": ".jpg~",
    "Thumbs.db": ".db",
    "desktop.ini": ".ini",
    "000.xml": ".xml",
    "000.txt": ".txt",
    "000.json": ".json",
    "labels.csv": ".csv",
    "000.npy": ".npy",
    "film.gif": ".gif",
    "photo.heic": ".heic",
    "raw.CR2": ".cr2",
    "noextension": "",
}


@pytest.fixture
def place(tmp_path):
    return make_folder(tmp_path / "d", {"a": 2, "b": 3})


def opened(place, capsys):
    capsys.readouterr()
    source = open_source(place, "data.train")
    return source, capsys.readouterr().out.strip()


def test_the_extensions_are_torchvisions():
    assert sorted(EXTENSIONS) == sorted(IMG_EXTENSIONS)


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_of_systems_are_no_classes(place, name, capsys):
    for above in (place, place / "a"):
        (above / name).mkdir()
        (above / name / "000.jpg").write_bytes(JPEGS[0])
    source, said = opened(place, capsys)
    assert source.classes == ["a", "b"] and len(source) == 5
    assert said == f"data.train: left out of {place}: 2 hidden folders"
    assert len(find_images([str(place)])) == 5
    # and once more, from the index
    assert opened(place, capsys)[1] == said


@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_files_are_no_images(place, name, capsys):
    (place / "b" / name).write_bytes(JPEGS[0])
    (place / name).write_bytes(JPEGS[0])
    source, said = opened(place, capsys)
    assert len(source) == 5 and said == f"data.train: left out of {place}: 1 hidden file"
    assert len(find_images([str(place)])) == 5


@pytest.mark.parametrize("name", OTHERS)
def test_files_of_other_kinds_are_left_out_and_said(place, name, capsys):
    (place / "b" / name).write_bytes(JPEGS[0])
    source, said = opened(place, capsys)
    assert len(source) == 5
    assert said == f"data.train: left out of {place}: 1 file of other kinds ({OTHERS[name] or 'no extension'})"


def test_all_that_is_left_out_is_counted(place, capsys):
    for name in FOLDERS[:2]:
        (place / name).mkdir()
    for name in (*HIDDEN, *OTHERS):
        (place / "a" / name).write_bytes(b"x")
    (place / "stray.jpg").write_bytes(JPEGS[0])
    (place / "notes.txt").write_text("beside the classes: nobody takes it for an image")
    (place / "eel.zip").write_bytes(b"PK, a class that nobody has unpacked")
    os.symlink(place, place / "a" / "loop")
    os.mkfifo(place / "a" / "pipe.jpg")
    source, said = opened(place, capsys)
    assert len(source) == 5
    for part in (
        "2 hidden folders",
        "4 hidden files",
        "15 files of other kinds (",
        ", ...)",
        "1 image outside of the class folders",
        "1 link back to a folder above it",
        "1 device or pipe named as an image",
    ):
        assert part in said, (part, said)
    assert "\n" not in said


def test_torchvision_finds_the_same_images(tmp_path):
    place = tmp_path / "d"
    for name in (
        "a/x.jpg",
        "a/deep/er/y.JPEG",
        "b/z.PNG",
        "b/u.Tif",
        "b/v.ppm",
        "b/w.WebP",
        "b/k.pgm",
        "c d/0.bmp",
        "c d/1.tiff",
    ):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(JPEGS[0])
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "e.jpg").write_bytes(JPEGS[1])
    os.symlink(tmp_path / "elsewhere", place / "a" / "link")
    os.symlink(tmp_path / "elsewhere" / "e.jpg", place / "b" / "file.jpg")
    os.symlink(tmp_path / "elsewhere", place / "linked class")
    theirs = TorchvisionFolder(str(place))
    ours = open_source(place, "data.train")
    assert ours.classes == theirs.classes
    assert sorted(zip(ours.paths, ours.labels.tolist(), strict=True)) == sorted(theirs.samples)


def test_links_that_lead_back_end(tmp_path, capsys):
    place = make_folder(tmp_path / "d", {"a": 2, "b": 2})
    os.symlink("..", place / "a" / "up")
    (place / "b" / "in").mkdir()
    os.symlink(place / "b", place / "b" / "in" / "around")
    source, said = opened(place, capsys)
    # what is behind `up` are the classes themselves, each of which is looked into once
    assert len(source) < 12
    assert "link" in said
    os.symlink(tmp_path / "nothing", place / "b" / "gone.jpg")
    source, _ = opened(place, capsys)
    assert any(path.endswith("gone.jpg") for path in source.paths)


def test_a_link_to_the_folder_of_training_and_validation_brings_no_image_of_validation(tmp_path, capsys):
    place = make_folder(tmp_path / "d" / "train", {"a": 2, "b": 2})
    make_folder(tmp_path / "d" / "val", {"a": 5, "b": 5})
    for target in ("../..", tmp_path / "d", "/"):
        os.symlink(target, place / "a" / "link")
        source, said = opened(place, capsys)
        assert len(source) == 4 and "1 link back to a folder above it" in said
        (place / "a" / "link").unlink()


def test_a_class_behind_a_dead_link_is_named(tmp_path):
    place = make_folder(tmp_path / "d", {"a": 2, "b": 2})
    os.symlink(tmp_path / "gone", place / "c")
    assert "/d/c' is a link to " in message(place)
    (place / "c").unlink()
    os.symlink(tmp_path / "gone", place / "notes.txt")
    assert open_source(place, "data.train").classes == ["a", "b"]


@pytest.mark.parametrize("head", [b"P5 " + b"# " * 30, b"P6\n" + b"#\n" * 30, b"P3 1 1 255 " + b"1 " * 30])
def test_a_header_of_comments_alone_is_read_at_once(head):
    """The pattern for it must not try every way to split them."""
    assert not _is_dalis(np.frombuffer(head.ljust(64, b"#"), dtype=np.uint8))


def test_a_socket_is_no_image(place, capsys):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(place / "a" / "s.jpg"))
        source, said = opened(place, capsys)
    assert len(source) == 5 and "1 device or pipe named as an image" in said


@pytest.mark.parametrize(
    "name", [*(f"{folder}/000.jpg" for folder in FOLDERS), *HIDDEN, "./a/._x.jpg", "a/__MACOSX/a/._0.jpg"]
)
def test_members_of_systems_are_no_images_of_a_tar(tmp_path, name, capsys):
    tar = write_tar(tmp_path / "t.tar", [("./a/0.jpg", JPEGS[0]), ("./b/1.jpg", JPEGS[1]), (name, JPEGS[2])])
    source, said = opened(tar, capsys)
    assert source.classes == ["a", "b"] and len(source) == 2
    assert said == f"data.train: left out of {tar}: 1 hidden file"


@pytest.mark.parametrize("name", ["0001.txt", "0001.seg.npy", "meta.xml", "0000.png.txt"])
def test_members_of_other_kinds_are_said(tmp_path, name, capsys):
    tar = write_tar(tmp_path / "t.tar", [*labelled([0, 1]), (name, b"x")])
    source, said = opened(tar, capsys)
    assert len(source) == 2 and f"1 file of other kinds ({os.path.splitext(name)[1]})" in said


def test_hidden_shards_are_no_shards(tmp_path):
    write_tar(tmp_path / "a.tar", labelled([0, 1]))
    (tmp_path / "._a.tar").write_bytes(b"a resource fork")
    (tmp_path / "@eaDir").mkdir()
    assert len(open_source(tmp_path, "data.train")) == 2


def dotted(names, labels):
    return [(name, JPEGS[i % 6]) for i, name in enumerate(names)] + [
        (name, str(i % 2).encode()) for i, name in enumerate(labels)
    ]


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (["0.jpg", "1.jpg"], ["0.cls", "1.cls"]),
        (["0.left.jpg", "1.left.jpg"], ["0.cls", "1.cls"]),
        (["0.jpg.jpg", "1.jpg.JPG"], ["0.cls", "1.cls"]),
        (["v1.0.jpg", "v1.1.jpg"], ["v1.0.cls", "v1.1.cls"]),
        (["a.b/0.jpg", "a.b/1.jpg"], ["a.b/0.cls", "a.b/1.cls"]),
        (["./x/0.jpg", "x/1.jpg"], ["x/0.cls", "./x/1.cls"]),
        (["0.input.png.jpg", "1.input.png.jpg"], ["0.target.cls", "1.target.cls"]),
    ],
)
def test_dots_in_names_of_members(tmp_path, images, labels):
    source = open_source(write_tar(tmp_path / "t.tar", dotted(images, labels)), "data.train")
    assert source.labels.tolist() == [0, 1]
    assert [source.read(i).tobytes() for i in range(2)] == JPEGS[:2]


@pytest.mark.parametrize(
    ("members", "says"),
    [
        (dotted(["0.left.jpg", "0.right.jpg"], ["0.cls"]), "two images for one sample, '0.left.jpg' and '0.right.jpg'"),
        (dotted(["0.jpg", "0.png"], ["0.cls"]), "two images for one sample"),
        (dotted(["a/0.jpg", "a/0.jpg"], []), "two images for one sample"),
        (
            [*labelled([0, 1]), ("0000.json", b'{"label": 1}')],
            "two labels for one sample, '0' ('0000.cls') and '1' (label in '0000.json'), which differ",
        ),
        (
            [("0.jpg", JPEGS[0]), ("0.cls", b"cat"), ("0.json", b'{"class": "dog"}')],
            "two labels for one sample, 'cat' ('0.cls') and 'dog' (class in '0.json'), which differ",
        ),
        ([("0.jpg", JPEGS[0]), ("1.cls", b"1")], "has no label"),
        ([("0.jpg", JPEGS[0]), ("0.cls", b" ")], "has no label"),
        ([("0.jpg", JPEGS[0])], "has no label"),
    ],
)
def test_samples_that_are_no_sample_are_named(tmp_path, members, says):
    assert says in message(write_tar(tmp_path / "t.tar", members))


@pytest.mark.parametrize(
    "json", [b'{"label": 0}', b'{"label": "tench"}', b'{"caption": "a cat"}', b"[1, 2]", b"junk", b""]
)
def test_a_json_beside_a_cls_that_agrees_or_says_something_else(tmp_path, json):
    tar = write_tar(tmp_path / "t.tar", [*labelled([0, 1]), ("0000.json", json)])
    assert open_source(tar, "data.train").labels.tolist() == [0, 1]


@pytest.mark.parametrize("name", ["0001.cls", "./0001.cls", "0001.CLS", "0001.left.cls"])
def test_two_labels_of_one_sample_are_one_only_where_they_are_equal(tmp_path, name):
    tar = write_tar(tmp_path / "t.tar", [*labelled([0, 1]), (name, b" 1\n")])
    assert open_source(tar, "data.train").labels.tolist() == [0, 1]
    tar = write_tar(tmp_path / "t.tar", [*labelled([0, 0, 1]), (name, b"1")])
    assert f"two labels for one sample, '0001.cls' and {name!r}, which differ" in message(tar)


def test_a_json_of_something_in_a_sample_gives_way_to_that_of_the_sample(tmp_path):
    labels = [("0.meta.json", b'{"label": 1}'), ("0.json", b'{"label": 0}'), ("1.json", b'{"label": 1}')]
    tar = write_tar(tmp_path / "t.tar", [("0.jpg", JPEGS[0]), ("1.jpg", JPEGS[1]), *labels])
    assert open_source(tar, "data.train").labels.tolist() == [0, 1]


def test_the_line_is_empty_for_nothing_and_has_other_ranks_silent(capsys, monkeypatch):
    say_left_out({}, "data.train", "d")
    monkeypatch.setenv("RANK", "1")
    say_left_out({"hidden folder": 1}, "data.train", "d")
    assert capsys.readouterr().out == ""


def test_archives_that_macs_make_are_read(tmp_path):
    """What bsdtar writes on a Mac beside every file."""
    tar = tmp_path / "t.tar"
    with tarfile.open(tar, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "x" * 300}) as archive:
        for name in ("a/._0.jpg", "a/0.jpg", "b/._1.jpg", "b/1.jpg"):
            info = tarfile.TarInfo(name)
            info.size = len(JPEGS[0])
            info.pax_headers = {"LIBARCHIVE.xattr.com.apple.provenance": "AQAA"}
            archive.addfile(info, io.BytesIO(JPEGS[0]))
    assert len(open_source(tar, "data.train")) == 2
