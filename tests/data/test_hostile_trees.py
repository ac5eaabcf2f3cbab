"""Trees and tars that nobody would make on purpose: each is read by a rule of docs/data.md, or refused in one line."""

import contextlib
import io
import os
import subprocess
import tarfile

import pytest
from image_fixtures import make_folder
from source_fixtures import JPEGS, labelled, message, write_tar

from scalekd_ds.data.reader import BadImageError, Reader
from scalekd_ds.data.sources.open import open_source


@pytest.fixture
def place(tmp_path):
    return make_folder(tmp_path / "root" / "train", {"a": 2, "b": 2})


def read_all(source):
    """How many images of a source can be read, of all."""
    reader, good = Reader(source, keep_bytes=0), 0
    for index in range(len(source)):
        with contextlib.suppress(BadImageError):
            good += all(reader.size(index, reader.encoded(index)))
    return good, len(source)


def outside(place, *parts):
    """A folder outside of the class folders, with an image."""
    folder = place.parent.joinpath("outside", *parts)
    folder.mkdir(parents=True)
    (folder / "x.jpg").write_bytes(JPEGS[2])
    return folder


def two_folders_that_link_to_each_other(place):
    one, two = outside(place, "one"), outside(place, "two")
    (one / "on").symlink_to(two)
    (two / "back").symlink_to(one)
    (place / "a" / "in").symlink_to(one)


# what is done to two classes of two images -> (images that are read, images in all), and a part of the line that is said
LINKS = {
    "an image": (lambda p: (p / "a" / "x.jpg").symlink_to(p / "b" / "000.jpg"), (5, 5), ""),
    "an image, relative": (lambda p: (p / "a" / "x.jpg").symlink_to("../b/000.jpg"), (5, 5), ""),
    "an image without an extension": (
        lambda p: (p / "a" / "x").symlink_to("000.jpg"),
        (4, 4),
        "1 file of other kinds (no extension)",
    ),
    "a folder": (lambda p: (p / "a" / "in").symlink_to(outside(p)), (5, 5), ""),
    "a class": (lambda p: (p / "c").symlink_to(outside(p)), (5, 5), ""),
    "a sibling class": (lambda p: (p / "c").symlink_to("a"), (6, 6), ""),
    "a folder in a linked folder": (
        lambda p: (p / "a" / "in").symlink_to(outside(p, "deep", "er").parent.parent),
        (5, 5),
        "",
    ),
    "its own folder": (lambda p: (p / "a" / "up").symlink_to("."), (4, 4), "1 link back to a folder above it"),
    "the split": (lambda p: (p / "a" / "up").symlink_to(".."), (4, 4), "1 link back to a folder above it"),
    "the root of the data": (
        lambda p: (p / "a" / "up").symlink_to("../.."),
        (4, 4),
        "1 link back to a folder above it",
    ),
    "the root of the disk": (lambda p: (p / "a" / "up").symlink_to("/"), (4, 4), "1 link back to a folder above it"),
    "the split as a class": (lambda p: (p / "all").symlink_to("."), (4, 4), "1 link back to a folder above it"),
    "the root as a class": (lambda p: (p / "all").symlink_to(".."), (4, 4), "1 link back to a folder above it"),
    "each other": (two_folders_that_link_to_each_other, (6, 6), "1 link back to a folder above it"),
    "no image": (lambda p: (p / "a" / "x.jpg").symlink_to("/nowhere/x.jpg"), (4, 5), ""),
    "itself": (lambda p: (p / "a" / "x.jpg").symlink_to("x.jpg"), (4, 5), ""),
    "something below a file": (lambda p: (p / "a" / "x.jpg").symlink_to("000.jpg/x.jpg"), (4, 5), ""),
    "itself, without an extension": (lambda p: (p / "a" / "x").symlink_to("x"), (4, 4), "1 file of other kinds"),
    "nothing, without an extension": (
        lambda p: (p / "a" / "x").symlink_to("/nowhere"),
        (4, 4),
        "1 file of other kinds",
    ),
    "nothing, hidden": (lambda p: (p / ".x").symlink_to("/nowhere"), (4, 4), ""),
}


@pytest.mark.parametrize("to", LINKS)
def test_links(place, to, capsys):
    (place.parent / "val" / "a").mkdir(parents=True)
    (place.parent / "val" / "a" / "secret.jpg").write_bytes(JPEGS[0])
    make, counts, said = LINKS[to]
    make(place)
    # from the walk, and from the index that it left
    for _ in range(2):
        capsys.readouterr()
        source = open_source(place, "data.train")
        assert read_all(source) == counts
        assert not [path for path in source.paths if "secret" in path]
        out = "".join(capsys.readouterr())
        assert said in out and ("left out" in out) == bool(said)


@pytest.mark.parametrize("target", ["/nowhere", "c", "a/000.jpg/x"])
def test_a_class_behind_a_link_that_cannot_be_followed_is_not_dropped_silently(place, target):
    (place / "c").symlink_to(target)
    assert f"c' is a link to {target!r}, which cannot be reached" in message(place)
    (place / "c").unlink()
    open_source(place, "data.train")
    # nor where an index is there already
    (place / "c").symlink_to(target)
    assert "which cannot be reached" in message(place)


@pytest.mark.parametrize("kind", ["folder", "table"])
@pytest.mark.parametrize("what", ["pipe", "folder", "socket"])
def test_what_is_no_file_is_never_waited_for(place, kind, what, capsys):
    odd = place / "a" / "odd.jpg"
    if what == "pipe":
        os.mkfifo(odd)
    elif what == "folder":
        odd.mkdir()
    else:
        subprocess.run(["python3", "-c", "import socket as s; s.socket(s.AF_UNIX).bind('odd.jpg')"], cwd=place / "a")
    if kind == "folder":
        assert read_all(open_source(place, "data.train")) == (4, 4)
        return
    rows = ["path,label", "a/000.jpg,a", "b/000.jpg,b", "a/odd.jpg,a"]
    (place / "t.csv").write_text("\n".join(rows) + "\n")
    assert read_all(open_source(place / "t.csv", "data.train")) == (2, 3)


@pytest.mark.parametrize("name", ["c.tar", "c-0-of-1", "c.tfrecord", "c.jpg", "c.csv", "-c", "c d", "C", "{0..1}"])
def test_class_folders_of_any_name_are_classes(place, name):
    (place / name).mkdir()
    (place / name / "0.jpg").write_bytes(JPEGS[0])
    source = open_source(place, "data.train")
    assert source.classes == sorted(["a", "b", name]) and read_all(source) == (5, 5)


@pytest.mark.parametrize("name", ["1.tar.gz", "1.tgz", "1.tar.part", "1.tar~", "notes.md", "sizes.json", "0.tar.xz"])
def test_what_lies_beside_shards_is_counted(tmp_path, name, capsys):
    write_tar(tmp_path / "0.tar", labelled([0, 1]))
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    (tmp_path / "lost+found").mkdir()
    (tmp_path / name).write_bytes(b"x")
    for _ in range(2):
        assert len(open_source(tmp_path, "data.train")) == 2
        assert f"left out of {tmp_path}: 1 file beside the shards" in "".join(capsys.readouterr())


def tar_with_links(path, links):
    """Two labelled images, and links (name, type, target) with a label each."""
    with tarfile.open(path, "w") as archive:
        for name, data in labelled([0, 1]):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for number, (name, kind, target) in enumerate(links):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)
            info = tarfile.TarInfo(f"{name.rpartition('.')[0]}.cls")
            info.size = 1
            archive.addfile(info, io.BytesIO(b"%d" % (number % 2)))
    return path


@pytest.mark.parametrize(
    ("links", "count", "dead"),
    [
        ([("2.jpg", tarfile.LNKTYPE, "0000.jpg")], 3, 0),
        ([("d/2.jpg", tarfile.LNKTYPE, "0000.jpg")], 3, 0),
        ([("d/2.jpg", tarfile.SYMTYPE, "../0000.jpg")], 3, 0),
        ([("2.jpg", tarfile.SYMTYPE, "./0000.jpg"), ("3.jpg", tarfile.SYMTYPE, "2.jpg")], 4, 0),
        ([("2.jpg", tarfile.SYMTYPE, "/nowhere.jpg")], 2, 1),
        ([("2.jpg", tarfile.SYMTYPE, "2.jpg")], 2, 1),
        ([("2.jpg", tarfile.SYMTYPE, "3.jpg"), ("3.jpg", tarfile.SYMTYPE, "2.jpg")], 2, 2),
        ([("2.jpg", tarfile.FIFOTYPE, "")], 2, 0),
    ],
)
def test_links_in_tars_have_the_bytes_of_what_they_name(tmp_path, links, count, dead, capsys):
    source = open_source(tar_with_links(tmp_path / "t.tar", links), "data.train")
    assert read_all(source) == (count, count)
    assert [source.read(i).tobytes() for i in range(2, count)] == [JPEGS[0]] * (count - 2)
    out = "".join(capsys.readouterr())
    assert (f"{dead} link" in out) == bool(dead) and ("pipe" in out) == (links[0][1] == tarfile.FIFOTYPE)


def test_a_tar_with_holes_is_refused(tmp_path):
    for i, label in enumerate("ab"):
        (tmp_path / label).mkdir()
        with open(tmp_path / label / "x.jpg", "wb") as file:
            file.write(JPEGS[i])
            file.truncate(5_000_000)
    done = subprocess.run(["tar", "--sparse", "-cf", "t.tar", "a", "b"], cwd=tmp_path)
    assert done.returncode == 0
    assert "is stored with holes: write the tar without --sparse" in message(tmp_path / "t.tar")


@pytest.mark.parametrize(
    "name", ["PaxHeaders.1234/0.jpg", "PaxHeader/0.jpg", "./__MACOSX/._0000.jpg", "x/@eaDir/0.jpg"]
)
def test_headers_that_other_programs_keep_as_files_are_no_images(tmp_path, name, capsys):
    source = open_source(write_tar(tmp_path / "t.tar", [*labelled([0, 1]), (name, b"30 mtime=1\n")]), "data.train")
    assert len(source) == 2 and "1 hidden file" in "".join(capsys.readouterr())


def test_json_that_no_parser_can_follow_is_named(tmp_path):
    tar = write_tar(tmp_path / "t.tar", [("0.jpg", JPEGS[0]), ("0.json", b"[" * 60_000)])
    assert "'0.json' in" in message(tar) and "is no JSON" in message(tar)


@pytest.mark.parametrize("first", ["labels", "folders"])
def test_tars_that_are_labelled_in_two_ways_are_refused(tmp_path, first):
    folders = [("train/0.jpg", JPEGS[0]), ("train/1.jpg", JPEGS[1])]
    sets = [labelled([0, 1]), folders]
    for name, members in zip("ab", sets if first == "labels" else sets[::-1], strict=True):
        write_tar(tmp_path / f"{name}.tar", members)
    assert "has a .cls or .json beside its images, and " in message(tmp_path)
