"""Damaged files: found by `verify`, left out of training, replaced where they turn up during it; and files that are gone."""

import io
import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from forking import forked
from image_fixtures import make_dataset, make_folder, picture
from launching import ROOT
from loading import take, train_loader
from PIL import Image

from scalekd_ds.config import DataConfig
from scalekd_ds.data.bad_files import BadFiles
from scalekd_ds.data.reader import BadImageError, Reader
from scalekd_ds.data.sampler import StreamSampler
from scalekd_ds.data.sources.hugging_face import open_hub
from scalekd_ds.data.sources.image_folder import ImageFolder, index_folder
from scalekd_ds.data.verify import QUARANTINE, find_flaws, read_quarantine, without_quarantined, write_quarantine
from scalekd_ds.errors import UserError

PREPARE = ROOT / "launch" / "prepare_data.py"


def encoded(kind: str, **kwargs) -> bytes:
    data = io.BytesIO()
    picture(np.random.default_rng(0), 40, 40).save(data, kind, **kwargs)
    return data.getvalue()


def broken_png() -> bytes:
    data = bytearray(encoded("PNG"))
    middle = len(data) // 2
    data[middle : middle + 40] = bytes(40)
    return bytes(data)


# ten ways for a file to be no image
DAMAGE = {
    "text": b"not an image",
    "empty": b"",
    "web page": b"<!DOCTYPE html><html><body>404</body></html>",
    "zeros": bytes(4096),
    "header alone": encoded("JPEG")[:24],
    "cut JPEG": encoded("JPEG")[:500],
    "cut PNG": encoded("PNG")[:300],
    "broken PNG": broken_png(),
    "HEIC": b"\0\0\0\x18ftypheic" + bytes(300),
    "link to nowhere": None,
}


def bmp_of_a_wrong_size() -> bytes:
    data = bytearray(encoded("BMP"))
    data[2:6] = (len(data) + 100).to_bytes(4, "little")
    return bytes(data)


# whole images that look cut off, or have more behind their end than anyone would search
SUSPECT = {
    "motion.jpg": encoded("JPEG") + b"\0\0\0\x18ftypmp42" + bytes(200_000),
    "progressive.jpg": encoded("JPEG", progressive=True) + bytes(100_000),
    "bytes behind.png": encoded("PNG") + bytes(100_000),
    "size.bmp": bmp_of_a_wrong_size(),
}


def damage(path: Path, kind: str) -> None:
    path.unlink()
    if DAMAGE[kind] is None:
        path.symlink_to(path.with_name("nowhere"))
    else:
        path.write_bytes(DAMAGE[kind])


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_bad_file_of_any_kind_is_replaced_from_its_class_and_named_once(tmp_path, capfd, kind):
    make_folder(tmp_path, {"a": 10, "b": 10})
    source = index_folder(tmp_path, "data.train")
    bad = 13
    damage(Path(source.paths[bad]), kind)
    cfg = DataConfig(image_size=16, max_bad_share=0.1)
    good = train_loader(source, cfg, micro=10)
    # two epochs, and labels as if nothing had happened
    batches = take(good, 4)
    sampler = good.sampler
    for step, (images, labels) in enumerate(batches):
        drawn, _ = sampler.indices(step, 0)
        assert labels.tolist() == source.labels[drawn].tolist()
        assert torch.isfinite(images).all()
    assert list(good.bad_files.reasons) == [bad]
    assert capfd.readouterr().err.count(source.paths[bad]) == 1
    # the same again, bit for bit, from another loader
    for (ours, _), (theirs, _) in zip(take(train_loader(source, cfg, micro=10), 4), batches, strict=True):
        assert torch.equal(ours, theirs)


def test_a_file_that_only_the_decoder_finds_bad_is_replaced_too(tmp_path, capfd):
    """Its first bytes are those of a TIFF: nothing stops it before DALI, which then needs a new pipeline."""
    make_folder(tmp_path, {"a": 10, "b": 10})
    source = index_folder(tmp_path, "data.train")
    Path(source.paths[13]).write_bytes(b"II*\x00" + bytes(200))
    batches = train_loader(source, DataConfig(image_size=16, max_bad_share=0.1, random_crop=False), micro=10)
    for step, (_, labels) in enumerate(take(batches, 6)):
        assert labels.tolist() == source.labels[batches.sampler.indices(step, 0)[0]].tolist()
    assert list(batches.bad_files.reasons) == [13]
    assert capfd.readouterr().err.count(f"warning: {source.paths[13]} ") == 1


def test_a_damaged_set_of_a_thousand_is_trained_on_to_the_end(tmp_path, capfd):
    make_folder(tmp_path / "train", {"a": 500, "b": 500}, size=(24, 24))
    source = index_folder(tmp_path / "train", "data.train")
    chosen = np.random.default_rng(0).permutation(1000)[:50]
    for place, index in enumerate(chosen.tolist()):
        damage(Path(source.paths[index]), list(DAMAGE)[place % 10])
    damaged = {source.paths[i] for i in chosen}
    batches = train_loader(source, DataConfig(image_size=16, max_bad_share=0.06), micro=50)
    assert sum(len(labels) for _, labels in take(batches, 20)) == 1000
    assert {source.paths[i] for i in batches.bad_files.reasons} == damaged
    err = capfd.readouterr().err
    assert all(err.count(f"warning: {path} ") == 1 for path in damaged)

    done = forked(PREPARE, "verify", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "50 of 1000 images cannot be used" in done.stdout
    assert set(read_quarantine(tmp_path)) == damaged
    clean = without_quarantined(source, tmp_path)
    assert set(clean.paths) == set(source.paths) - damaged
    assert len(take(train_loader(clean, DataConfig(image_size=16), micro=50), 19)) == 19


def test_too_many_bad_files_stop_the_run_and_are_listed(tmp_path):
    make_folder(tmp_path, {"a": 10, "b": 10})
    source = index_folder(tmp_path, "data.train")
    for index in (3, 11):
        damage(Path(source.paths[index]), "text")
    with pytest.raises(UserError) as error:
        take(train_loader(source, DataConfig(image_size=16, max_bad_share=0.05), micro=10), 2)
    message = str(error.value)
    assert "2 of 20 training images cannot be used" in message and "\n" not in message
    assert all(source.paths[i] in message for i in (3, 11))
    assert "verify DIR" in message


def test_a_class_without_a_good_file_is_named(tmp_path):
    make_folder(tmp_path, {"a": 10, "b": 1})
    source = index_folder(tmp_path, "data.train")
    damage(Path(source.paths[10]), "empty")
    with pytest.raises(UserError, match=r"every image of the class of .*b.*is bad"):
        take(train_loader(source, DataConfig(image_size=16, max_bad_share=1.0), micro=11), 2)


def test_replacements_spread_over_the_class():
    labels = np.repeat([0, 1], 50)
    bad = BadFiles(ImageFolder(Path(), [str(i) for i in range(100)], labels, ["a", "b"]), seed=3, max_share=1.0)
    bad.add(60, "is no image")
    drawn = [bad.replacement(60, epoch) for epoch in range(200)]
    assert {labels[i] for i in drawn} == {1} and 60 not in drawn
    assert len(set(drawn)) > 35
    assert drawn == [bad.replacement(60, epoch) for epoch in range(200)]


def test_images_that_pillow_and_dali_take_are_not_flawed(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    images = {
        "grey.jpg": Image.new("L", (30, 20), 90),
        "cmyk.jpg": Image.new("CMYK", (30, 20), (10, 20, 30, 40)),
        "alpha.png": Image.new("RGBA", (30, 20), (1, 2, 3, 4)),
        "palette.png": Image.new("P", (30, 20)),
        "photo.webp": Image.new("RGB", (30, 20), (1, 2, 3)),
        "photo.bmp": Image.new("RGB", (30, 20), (1, 2, 3)),
    }
    for name, image in images.items():
        image.save(tmp_path / "a" / name)
    (tmp_path / "b" / "png_named.jpg").write_bytes(encoded("PNG"))
    for name, data in SUSPECT.items():
        (tmp_path / "b" / name).write_bytes(data)
    source = index_folder(tmp_path, "verify")
    assert find_flaws(source, workers=1) == {}
    reader = Reader(source, keep_bytes=0)
    for index in range(len(source)):
        assert reader.encoded(index).size and all(reader.size(index, reader.encoded(index)))


def test_a_large_image_is_called_large(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "small.png").write_bytes(encoded("PNG"))
    Image.new("1", (14_000, 13_500)).save(tmp_path / "a" / "scan.png")
    reason = "is too large: 189 megapixels, and at most 179 are read, against decompression bombs; scale it down"
    source = index_folder(tmp_path, "verify")
    assert list(find_flaws(source, workers=1).values()) == [reason]
    number = next(i for i in range(3) if source.name(i).endswith("scan.png"))
    reader = Reader(source, keep_bytes=0)
    with pytest.raises(BadImageError, match="is too large: 189 megapixels"):
        reader.size(number, reader.encoded(number))


def test_a_row_without_an_image_is_one_bad_image(tmp_path, monkeypatch):
    """Its source has a name where others have a folder, which nobody may take for a lost disk."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    image = {"bytes": encoded("PNG"), "path": None}
    rows = {"image": [image, None, image, image], "label": [0, 1, 1, 0]}
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows, features=features)}).save_to_disk(tmp_path / "hf")
    monkeypatch.chdir(tmp_path)
    reader = Reader(open_hub("hf:hf:train", "data.train"), keep_bytes=0)
    assert reader.encoded(0).size
    with pytest.raises(BadImageError, match="its row has no image"):
        reader.encoded(1)


@pytest.mark.parametrize("mode", ["I;16", "L", "LA", "P", "RGBA", "1", "CMYK", "webp"])
def test_modes_are_read_as_pillow_reads_them(tmp_path, mode):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        grey = rng.integers(0, 256, (40, 40)).astype(np.uint8)
        if mode == "I;16":
            image = Image.fromarray(rng.integers(0, 600, (40, 40)).astype(np.uint16))
        else:
            image = Image.fromarray(np.stack([grey, grey.T, 255 - grey], -1)).convert("RGB" if mode == "webp" else mode)
        suffix, options = {"CMYK": ("jpg", {}), "webp": ("webp", {"lossless": True})}.get(mode, ("png", {}))
        image.save(tmp_path / name / f"x.{suffix}", **options)
    source = index_folder(tmp_path, "data.train")
    cfg = DataConfig(image_size=40, random_crop=False, hflip=0.0)
    batches = train_loader(source, cfg, micro=2)
    images, _ = take(batches, 1)[0]
    for path, ours in zip([source.paths[i] for i in batches.sampler.indices(0, 0)[0]], images, strict=True):
        theirs = np.asarray(Image.open(path).convert("RGB"), dtype=np.float32).transpose(2, 0, 1)
        assert np.abs(ours.numpy() - theirs).max() <= 2.0, path


def test_the_quarantine_is_a_list_of_paths_below_the_folder(tmp_path):
    flaws = {str(tmp_path / "a" / "1.jpg"): "is\tno\nimage", str(tmp_path / "b" / "2 3.jpg"): "is damaged"}
    assert write_quarantine(tmp_path, flaws).read_text() == "a/1.jpg\tis no image\nb/2 3.jpg\tis damaged\n"
    assert read_quarantine(tmp_path) == {**flaws, str(tmp_path / "a" / "1.jpg"): "is no image"}
    assert not [p for p in os.listdir(tmp_path) if p.startswith(".")]
    for line in ("no tab", "/etc/passwd\tx", "../x.jpg\tx"):
        (tmp_path / QUARANTINE).write_text(line + "\n")
        with pytest.raises(UserError, match="line 1"):
            read_quarantine(tmp_path)


def test_a_quarantine_that_empties_a_class_is_refused(tmp_path):
    data = make_dataset(tmp_path, train=4, val=2, classes=2)
    source = index_folder(data / "train", "data.train")
    write_quarantine(data, dict.fromkeys(source.paths[:2], "is damaged"))
    with pytest.raises(UserError, match="every image of class"):
        without_quarantined(source, data)


# -- files that are gone; evaluation replaces nothing: test_left_out.py --------------------------------------------------


@pytest.mark.parametrize("damage", ["cut", "heic"])
@pytest.mark.parametrize("random_crop", [True, False])
def test_a_damaged_training_image_is_named_in_a_later_batch(tmp_path, damage, random_crop):
    make_folder(tmp_path, {"a": 12, "b": 12})
    source = index_folder(tmp_path, "data.train")
    # in the third batch of four, while DALI works three ahead
    bad = Path(source.paths[StreamSampler(24, 0, 4, 4, 0, 1).indices(2, 0)[0][1]])
    bad.write_bytes({"cut": bad.read_bytes()[:700], "heic": DAMAGE["HEIC"]}[damage])
    with pytest.raises(UserError) as error:
        take(train_loader(source, DataConfig(image_size=32, prefetch=3, random_crop=random_crop, max_bad_share=0)), 6)
    assert str(bad) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("how", ["removed", "emptied"])
def test_a_folder_that_vanished_stops_training_and_counts_no_bad_file(tmp_path, how):
    folder = make_folder(tmp_path / "train", {"a": 30, "b": 30})
    source = index_folder(folder, "data.train")
    loader = train_loader(source, DataConfig(image_size=32, keep_mb=0), micro=6)
    batches = iter(loader)
    next(batches)
    folder.rename(tmp_path / "elsewhere")
    if how == "emptied":
        # as the mount point of a lost mount is
        folder.mkdir()
    # a thread may look between the two steps
    problem = "(it is empty now|No such file or directory)" if how == "emptied" else "No such file or directory"
    with pytest.raises(UserError, match=rf"folder .*train' cannot be read any more \({problem}\).*--run.resume auto"):
        list(itertools.islice(batches, 20))
    assert not len(loader.bad_files)
