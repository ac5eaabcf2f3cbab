"""An index is used only for the data that it is of, whatever their times say; facts that went stale do no harm."""

import csv
import io
import itertools
import os
import shutil

import numpy as np
import pytest
import torch
from image_fixtures import make_folder
from PIL import Image
from source_fixtures import JPEGS, example, labelled, write_records, write_tar

from scalekd_ds.config import DataConfig
from scalekd_ds.data import EvalLoader, StreamSampler, TrainLoader
from scalekd_ds.data.reader import Reader
from scalekd_ds.data.sources import index as sources
from scalekd_ds.data.sources.open import open_source
from scalekd_ds.errors import UserError

WHEN = (1_700_000_000 * 10**9,) * 2


def with_one_time(place):
    """All times of a tree made equal, as images of disks and archives have them."""
    for path in sorted(place.rglob("*"), reverse=True):
        if not path.is_symlink():
            os.utime(path, ns=WHEN)
    os.utime(place, ns=WHEN)


def folder(place, names=("a/0.bmp", "a/1.bmp", "b/0.bmp", "b/1.bmp"), size=(40, 24)):
    for i, name in enumerate(names):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (i * 20, 0, 0)).save(place / name)
    return place


def table(place, rows):
    place.mkdir(exist_ok=True)
    for i, (name, _) in enumerate(rows):
        (place / name).write_bytes(JPEGS[i % 6])
    with open(place / "t.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *rows])
    return place / "t.csv"


def records_of(place, labels):
    records = [example(image__encoded=JPEGS[i], image__class__label=label) for i, label in enumerate(labels)]
    return write_records(place / "t.tfrecord", records)


ROWS = [("0.jpg", "a"), ("1.jpg", "b"), ("2.jpg", "a")]
# each writes the first and the second version of the data with the same names, sizes of files and times where that is
# possible; the labels or names of the second are others
VERSIONS = {
    "an image added to a folder": (
        lambda p: folder(p),
        lambda p: folder(p, ("a/0.bmp", "a/1.bmp", "a/2.bmp", "b/0.bmp", "b/1.bmp")),
    ),
    "an image removed from a folder": (lambda p: folder(p), lambda p: folder(p, ("a/0.bmp", "b/0.bmp", "b/1.bmp"))),
    "an image renamed": (lambda p: folder(p), lambda p: folder(p, ("a/0.bmp", "a/x.bmp", "b/0.bmp", "b/1.bmp"))),
    "an image moved to another class": (
        lambda p: folder(p),
        lambda p: folder(p, ("a/0.bmp", "b/0.bmp", "b/1.bmp", "b/2.bmp")),
    ),
    "a class added": (
        lambda p: folder(p),
        lambda p: folder(p, ("a/0.bmp", "a/1.bmp", "b/0.bmp", "b/1.bmp", "c/0.bmp")),
    ),
    "a class renamed": (lambda p: folder(p), lambda p: folder(p, ("a/0.bmp", "a/1.bmp", "c/0.bmp", "c/1.bmp"))),
    "a folder in a class": (
        lambda p: folder(p),
        lambda p: folder(p, ("a/0.bmp", "a/1.bmp", "a/in/0.bmp", "b/0.bmp", "b/1.bmp")),
    ),
    "an image below a folder in a class": (
        lambda p: folder(p, ("a/in/0.bmp", "b/0.bmp")),
        lambda p: folder(p, ("a/in/0.bmp", "a/in/1.bmp", "b/0.bmp")),
    ),
    "an image for a companion": (
        lambda p: [folder(p), (p / "a" / "2.txt").write_text("x")][0],
        lambda p: folder(p, ("a/0.bmp", "a/1.bmp", "a/2.bmp", "b/0.bmp", "b/1.bmp")),
    ),
    "labels of a table": (lambda p: table(p, ROWS), lambda p: table(p, [(n, "ba"[label == "b"]) for n, label in ROWS])),
    "paths of a table": (
        lambda p: table(p, ROWS),
        lambda p: table(p, [("1.jpg", "a"), ("0.jpg", "b"), ("2.jpg", "a")]),
    ),
    "labels of a tar": (
        lambda p: write_tar(p / "t.tar", labelled([0, 1, 0])),
        lambda p: write_tar(p / "t.tar", labelled([1, 0, 1])),
    ),
    "order of a tar": (
        lambda p: write_tar(p / "t.tar", labelled([0, 1, 0])),
        lambda p: write_tar(p / "t.tar", labelled([0, 1, 0])[::-1]),
    ),
    "labels of a TFRecord": (lambda p: records_of(p, [0, 1, 0]), lambda p: records_of(p, [1, 0, 1])),
}


@pytest.mark.parametrize("kind", VERSIONS)
@pytest.mark.parametrize("index", ["beside", "cache"])
def test_another_version_with_the_same_times_is_seen(tmp_path, kind, index, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place, paths_of = tmp_path / "data", sources._index_paths

    def opened(version):
        place.mkdir(exist_ok=True)
        where = VERSIONS[kind][version](place)
        with_one_time(place)
        if index == "cache":
            # as on a mount that cannot be written
            monkeypatch.setattr(sources, "_index_paths", lambda data: paths_of(data)[1:])
        source = open_source(where, "data.train")
        return [
            (source.name(i), source.classes[source.labels[i]], source.read(i).tobytes()) for i in range(len(source))
        ]

    first = opened(0)
    assert opened(0) == first
    kept = list(tmp_path.rglob("*.npz"))
    assert len(kept) == 1
    indexes = {path: path.read_bytes() for path in kept}
    shutil.rmtree(place)
    place.mkdir()
    for path, data in indexes.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    capsys.readouterr()
    second = opened(1)
    assert second != first
    assert "is stale" in capsys.readouterr().err
    # and it is what a new index says
    for path in tmp_path.rglob("*.npz"):
        path.unlink()
    assert opened(1) == second


def loaders(source, keep_mb=0):
    cfg = DataConfig(image_size=16, eval_resize=16, threads=1, keep_mb=keep_mb, interpolation="bilinear")
    sampler = StreamSampler(len(source), 0, len(source), len(source), 0, 1)
    device = torch.device("cpu")
    train = TrainLoader(source, cfg, sampler, device, [0.0] * 3, [1.0] * 3)
    return train, EvalLoader(source, cfg, 4, 0, 1, device, [0.0] * 3, [1.0] * 3)


def turn(paths):
    """Each bitmap turned by 90 degrees in place: as many bytes, another height and width."""
    for path in paths:
        with Image.open(path) as image:
            turned = image.rotate(90, expand=True)
        before = os.stat(path)
        with open(path, "r+b") as file:
            turned.save(file, "BMP")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert os.stat(path).st_size == before.st_size


@pytest.mark.parametrize("when", ["before the start", "during the run"])
def test_images_of_another_size_and_as_many_bytes_are_read_right(tmp_path, when):
    """Crops are drawn for the image that is there: a window of another size is an error of DALI's, or a wrong crop."""
    folder(tmp_path, tuple(f"{c}/{i}.bmp" for c in "ab" for i in range(8)), size=(120, 40))
    source = open_source(tmp_path, "data.train")
    if when == "before the start":
        turn(source.paths)
    train, val = loaders(open_source(tmp_path, "data.train"))
    for number, (images, _) in zip(range(12), train, strict=False):
        assert images.shape == (16, 3, 16, 16)
        if when == "during the run" and number == 0:
            turn(source.paths)
    train.close()
    assert sum(len(images) for images, _ in val) == 16
    assert len(train.bad_files) == 0


def test_a_table_a_tar_and_a_tfrecord_have_sizes_of_the_images_that_are_there(tmp_path):
    """A file of a table may change without the table; a shard that changes is another shard."""
    rows = [(f"{i}.bmp", "ab"[i % 2]) for i in range(4)]
    folder(tmp_path, [name for name, _ in rows], size=(120, 40))
    with open(tmp_path / "t.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *rows])
    source = open_source(tmp_path / "t.csv", "data.train")
    turn(source.paths)
    reader = Reader(open_source(tmp_path / "t.csv", "data.train"), keep_bytes=0)
    assert [reader.size(i, reader.encoded(i)) for i in range(4)] == [(120, 40)] * 4


def encoded(size, kind):
    data = io.BytesIO()
    options = {"lossless": True} if kind == "webp" else {}
    pixels = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(data, {"jpg": "JPEG", "ppm": "PPM", "tif": "TIFF"}.get(kind, kind), **options)
    return data.getvalue()


SIZES = {"turned": (40, 120), "smaller": (17, 19), "larger": (500, 300)}


def rewritten():
    """Every kind, size and source; in CI each kind and each of the others once."""
    for kind, name, source_of in itertools.product(
        ("jpg", "png", "bmp", "webp", "ppm", "tif"), SIZES, ("folder", "table")
    ):
        quick = (
            (name, source_of) == ("turned", "folder")
            or (kind, name) == ("jpg", "smaller")
            or (kind, name) == ("png", "larger")
        )
        marks = () if quick else pytest.mark.slow
        yield pytest.param(kind, SIZES[name], source_of, marks=marks, id=f"{source_of}-{name}-{kind}")


@pytest.mark.parametrize(("kind", "size", "source_of"), rewritten())
def test_images_written_again_during_a_run_are_cropped_as_what_they_are(tmp_path, kind, size, source_of):
    """The batches after the change are those of a run that starts with the new images at the same step."""
    names = [f"{c}/{i}.{kind}" for c in "ab" for i in range(4)]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encoded((120, 40), kind))
    (tmp_path / "t.csv").write_text("path,label\n" + "".join(f"{name},{name[0]}\n" for name in names))
    where = tmp_path if source_of == "folder" else tmp_path / "t.csv"
    batches = iter(loaders(open_source(where, "data.train"))[0])
    next(batches)
    for name in names:
        # at once, as a thread may be reading it
        (tmp_path / "aside").write_bytes(encoded(size, kind))
        (tmp_path / "aside").replace(tmp_path / name)
    # what was read ahead of the change is given out first
    ours = [next(batches) for _ in range(10)][-1]
    theirs = [batch for batch, _ in zip(loaders(open_source(where, "data.train"))[0], range(11), strict=False)][-1]
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("kind", ["folder", "tar", "TFRecord"])
@pytest.mark.parametrize("what", ["noise", "zeros", "another order", "half"])
def test_other_bytes_in_the_place_of_images_never_end_a_run_in_a_traceback(tmp_path, kind, what):
    """Of the same length and time, so that nothing tells them apart before they are read."""
    if kind == "folder":
        for i in range(6):
            (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
            (tmp_path / "ab"[i % 2] / f"{i}.jpg").write_bytes(JPEGS[i])
    elif kind == "tar":
        write_tar(tmp_path / "t.tar", labelled([0, 1] * 3))
    else:
        records_of(tmp_path, [0, 1] * 3)
    with_one_time(tmp_path)
    batches = iter(loaders(open_source(tmp_path, "data.train"))[0])
    next(batches)
    for path in [p for p in tmp_path.rglob("*") if p.is_file() and "scalekd_index" not in p.name]:
        data = path.read_bytes()
        other = {
            "noise": np.random.default_rng(0).bytes(len(data)),
            "zeros": bytes(len(data)),
            "another order": data[len(data) // 3 :] + data[: len(data) // 3],
            "half": data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
        }[what]
        with open(path, "r+b") as file:
            file.write(other)
    with_one_time(tmp_path)
    with pytest.raises(UserError, match="training images cannot be used") as error:
        for _ in range(12):
            next(batches)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("loader", [0, 1], ids=["training", "evaluation"])
@pytest.mark.parametrize("keep_mb", [0, 100])
def test_a_file_that_is_being_written_while_it_is_read_is_read_again(tmp_path, loader, keep_mb):
    """Its structure is whole, its pixels are not; when the decoder has refused it, the file is whole as well."""
    folder(tmp_path)
    source = open_source(tmp_path, "data.train")
    whole = [source.read(i) for i in range(4)]
    broken = bytearray(encoded((24, 40), "jpg"))
    # a table of Huffman codes that no decoder takes
    at = broken.index(b"\xff\xc4")
    broken[at + 5 : at + 21] = b"\xff" * 16

    class BeingWritten:
        """The source of which one image is read too early, once."""

        def __init__(self):
            self.early = 1

        def __getattr__(self, name):
            return getattr(source, name)

        def __len__(self):
            return len(source)

        def read(self, index):
            if index == 2 and self.early:
                self.early -= 1
                return np.frombuffer(bytes(broken), dtype=np.uint8)
            return whole[index]

    being_written = BeingWritten()
    made = loaders(being_written, keep_mb)[loader]
    being_written.early = 1
    images, _ = next(iter(made))
    expected, _ = next(iter(loaders(source)[loader]))
    assert torch.equal(images, expected) and not being_written.early
    made.close()


def test_labels_exchanged_in_the_middle_of_a_tar_are_seen(tmp_path):
    """Between the blocks that a large set is known by, in a small one, all of whose bytes are compared."""
    members = []
    for i in range(60):
        members += [(f"{i:04d}.jpg", bytes(50_000)), (f"{i:04d}.cls", b"%d" % (i % 2))]
    tar = write_tar(tmp_path / "t.tar", members)
    with_one_time(tmp_path)
    assert open_source(tar, "data.train").labels.tolist() == [0, 1] * 30
    data = bytearray(tar.read_bytes())
    for number in (20, 21):
        at = data.index(f"{number:04d}.cls".encode()) + 512
        data[at] ^= 1
    tar.write_bytes(data)
    with_one_time(tmp_path)
    assert open_source(tar, "data.train").labels.tolist() == [0, 1] * 10 + [1, 0] + [0, 1] * 19


def test_the_check_of_a_large_set_is_cheap(tmp_path):
    """No file is opened or asked for its size at a start with an index."""
    make_folder(tmp_path / "d", {"a": 20, "b": 20})
    open_source(tmp_path / "d", "data.train")
    lengths = {path: path.read_bytes() for path in tmp_path.rglob("*.npz")}
    for path in (tmp_path / "d").rglob("*.jpg"):
        # reading one would fail, and asking for its size would give another
        before = os.stat(path.parent)
        path.unlink()
        os.symlink("/nowhere", path)
        os.utime(path.parent, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert len(open_source(tmp_path / "d", "data.train")) == 40
    # the index that was written first, with the lengths of then
    assert lengths == {path: path.read_bytes() for path in tmp_path.rglob("*.npz")} != {}
