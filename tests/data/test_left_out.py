"""Validation images that cannot be used: left out of every source, on any number of ranks, and counted."""

import io
import itertools
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from image_fixtures import make_folder
from loading import eval_loader
from PIL import Image
from source_fixtures import example, needs_datasets, write_records, write_table, write_tar
from test_bad_files import DAMAGE, SUSPECT, encoded

from scalekd_ds.config import DataConfig
from scalekd_ds.data.eval_loader import FILLER, LEFT_OUT
from scalekd_ds.data.sources.image_folder import ImageFolder, index_folder
from scalekd_ds.data.sources.open import open_source
from scalekd_ds.evaluation.accuracy import count_correct, evaluate
from scalekd_ds.evaluation.left_out import LeftOutError, check_left_out

CFG = DataConfig(image_size=32, keep_mb=0, threads=2)
# bytes that a record can hold: every damage but a link, what only DALI refuses, and what Pillow's header reader fails on
BROKEN = {name: data for name, data in DAMAGE.items() if data is not None}
BROKEN |= {
    "TIFF that is none": b"II*\x00" + bytes(200),
    "16-bit PNG without pixels": b"",
    "JPEG of no size": b"\xff\xd8\xff\xc0\x00\x11\x08\x00\x00\x00\x00\x03" + bytes(12) + b"\xff\xd9",
    "JPEG 2000 that is none": b"\x00\x00\x00\x0cjP  " + bytes(100),
}


def png16_of_wrong_pixels() -> bytes:
    """A 16-bit PNG whose checksums are right and whose compressed pixels are none."""
    data = io.BytesIO()
    Image.fromarray(np.zeros((40, 40), np.uint16)).save(data, "PNG")
    whole = data.getvalue()
    place = whole.index(b"IDAT")
    length = int.from_bytes(whole[place - 4 : place], "big")
    chunk = b"IDAT" + b"\x55" * length
    return whole[:place] + chunk + zlib.crc32(chunk).to_bytes(4, "big") + whole[place + 8 + length :]


BROKEN["16-bit PNG without pixels"] = png16_of_wrong_pixels()
GOOD = [encoded("JPEG", quality=60 + i) for i in range(7)] + list(SUSPECT.values())
# good and broken ones by turns
CONTENT = [data for pair in itertools.zip_longest(GOOD, BROKEN.values()) for data in pair if data is not None]
BAD = {place for place, data in enumerate(CONTENT) if data in BROKEN.values()}


def folder(root: Path):
    for place, data in enumerate(CONTENT):
        file = root / f"class_{place % 3}" / f"{place:03d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return index_folder(root, "data.val")


def table(root: Path):
    for place, data in enumerate(CONTENT):
        (root / f"{place:03d}.jpg").write_bytes(data)
    return open_source(write_table(root, [(f"{i:03d}.jpg", i % 3) for i in range(len(CONTENT))]), "data.val")


def tar(root: Path):
    members = []
    for place, data in enumerate(CONTENT):
        members += [(f"{place:03d}.jpg", data), (f"{place:03d}.cls", str(place % 3).encode())]
    return open_source(write_tar(root / "a.tar", members), "data.val")


def tfrecord(root: Path):
    made = [example(image__encoded=data, image__class__label=place % 3) for place, data in enumerate(CONTENT)]
    return open_source(write_records(root / "a.tfrecord", made), "data.val")


def hugging_face(root: Path):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    rows = {"image": [{"bytes": data, "path": None} for data in CONTENT], "label": [i % 3 for i in range(len(CONTENT))]}
    # a row without bytes has no image
    rows["image"] = [row if row["bytes"] else None for row in rows["image"]]
    datasets.Dataset.from_dict(rows, features).save_to_disk(root / "saved")
    return open_source(f"hf:{root}/saved", "data.val")


SOURCES = [folder, table, tar, tfrecord, pytest.param(hugging_face, marks=needs_datasets)]


def places_of(source) -> list[int]:
    """The place in CONTENT of each sample: folders order them by class, and some sources leave out what is empty."""
    names = [source.name(i) for i in range(len(source))]
    if any("record" in name for name in names) or "hf" in names[0] or "row" in names[0]:
        return list(range(len(names)))
    return [int(Path(name.rpartition(":")[2]).stem) for name in names]


@pytest.mark.parametrize("make", SOURCES)
def test_what_cannot_be_used_is_left_out_of_every_source_on_any_number_of_ranks(tmp_path, make, capfd):
    """13 kinds of damage, 5 sources, 3 numbers of ranks: the good images come once, and their pixels are their own."""
    source = make(tmp_path)
    places = places_of(source)
    bad = {i for i, place in enumerate(places) if place in BAD}
    assert len(bad) >= 12 and len(places) - len(bad) >= 11
    good = sorted(set(range(len(source))) - bad)
    clean = torch.cat([images for images, _ in eval_loader(source.select(good), CFG, 4)])[: len(good)]
    counts = {}
    for world in (1, 2, 3):
        loaders = [eval_loader(source, CFG, 4, rank, world) for rank in range(world)]
        seen, lengths, total = {}, set(), torch.zeros(4, dtype=torch.float64)
        # a second evaluation is like the first
        for _ in range(2 if world == 1 else 1):
            for loader in loaders:
                batches = list(loader)
                lengths.add((len(batches), sum(len(labels) for _, labels in batches)))
                indices = np.concatenate(loader.shard)
                for index, image, label in zip(
                    indices, *(torch.cat(parts) for parts in zip(*batches, strict=True)), strict=True
                ):
                    if index < 0:
                        assert label == FILLER
                    elif int(index) in bad:
                        assert label == LEFT_OUT, source.name(int(index))
                    else:
                        assert label == source.labels[index], source.name(int(index))
                        assert torch.equal(image, clean[good.index(int(index))])
                        seen[int(index)] = seen.get(int(index), 0) + 1
        for loader in loaders:
            assert set(loader.left_out) <= bad
            for images, labels in loader:
                # an answer that is a function of the image alone
                total += count_correct(images.flatten(1)[:, :3], labels)
        assert len(lengths) == 1
        assert set(seen) == set(good) and len(set(seen.values())) == 1
        assert total[0] == len(good) and total[3] == len(bad)
        counts[world] = total.tolist()
    assert counts[1] == counts[2] == counts[3]
    assert "warning" not in capfd.readouterr().err


def constant(images: torch.Tensor) -> torch.Tensor:
    """Logits that choose class 0."""
    return torch.tensor([[1.0, 0.0, 0.0]]).expand(len(images), 3)


def judged(source, max_share: float, told: int = 0):
    loader = eval_loader(source, CFG, 4)
    accuracy = evaluate(constant, loader, torch.device("cpu"))
    check_left_out(loader, accuracy, max_share, "data.max_bad_share", told)
    return accuracy


@pytest.mark.parametrize("how", ["damaged", "unlinked", "emptied", "a folder in its place"])
def test_an_image_that_becomes_bad_between_two_evaluations_is_left_out_of_the_second(tmp_path, how, capfd):
    source = index_folder(make_folder(tmp_path, {"a": 5, "b": 5, "c": 5}), "data.val")
    loader = eval_loader(source, CFG, 4)
    assert evaluate(constant, loader, torch.device("cpu")) == {
        "top1": pytest.approx(100 / 3),
        "top5": 100.0,
        "images": 15,
        "left_out": 0,
    }
    victim = tmp_path / "b" / "002.jpg"
    content = victim.read_bytes()
    victim.unlink()
    if how == "damaged":
        # whole in structure, so that only the decoder finds it
        victim.write_bytes(content[:200] + b"\xff" * 100 + b"\xff\xd9")
    elif how == "emptied":
        victim.touch()
    elif how != "unlinked":
        victim.mkdir()
    accuracy = evaluate(constant, loader, torch.device("cpu"))
    assert accuracy["images"] == 14 and accuracy["left_out"] == 1
    assert accuracy["top1"] == pytest.approx(100 * 5 / 14)
    check_left_out(loader, accuracy, 0.1, "data.max_bad_share")
    check_left_out(loader, accuracy, 0.1, "data.max_bad_share", told=1)
    # decoders write lines of their own
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning")]
    assert line.startswith(
        f"warning: 1 of 15 validation images cannot be used, and are left out of top-1 and top-5: {victim}"
    )


@pytest.mark.parametrize(
    ("bad", "share", "allowed"),
    [(1, 0.0, False), (1, 0.001, True), (2, 0.001, False), (1, 0.07, True), (3, 0.2, True), (4, 0.2, False)],
)
def test_the_share_is_that_of_all_validation_images_and_a_single_one_is_always_allowed(tmp_path, bad, share, allowed):
    source = index_folder(make_folder(tmp_path, {"a": 5, "b": 5, "c": 5}), "data.val")
    for number in range(bad):
        Path(source.paths[4 * number]).write_bytes(b"text")
    if allowed:
        assert judged(source, share)["left_out"] == bad
        return
    with pytest.raises(LeftOutError) as error:
        judged(source, share)
    text = str(error.value)
    assert f"{bad} of 15 validation images cannot be used, more than data.max_bad_share {share:g} allows" in text
    assert source.paths[0] in text and "\n" not in text


def test_a_set_without_any_image_left_is_an_error_at_any_share(tmp_path):
    source = index_folder(make_folder(tmp_path, {"a": 3, "b": 3, "c": 3}), "data.val")
    for path in source.paths:
        Path(path).write_bytes(b"")
    with pytest.raises(LeftOutError, match=r"none of the 9 validation images can be used: .*, and 4 more"):
        judged(source, 1.0)


def test_a_folder_that_vanished_is_said_to_be_gone(tmp_path):
    source = index_folder(make_folder(tmp_path / "val", {"a": 3, "b": 3, "c": 3}), "data.val")
    loader = eval_loader(source, CFG, 4)
    shutil.move(tmp_path / "val", tmp_path / "gone")
    accuracy = evaluate(constant, loader, torch.device("cpu"))
    with pytest.raises(LeftOutError, match=r"folder .*val' cannot be read any more"):
        check_left_out(loader, accuracy, 1.0, "data.max_bad_share")


@pytest.mark.parametrize("kind", [ValueError, KeyError, RuntimeError, MemoryError, TypeError])
def test_a_reader_that_raises_anything_costs_one_image(tmp_path, kind, monkeypatch):
    """As a library of tables does at a damaged row."""
    source = index_folder(make_folder(tmp_path, {"a": 3, "b": 3, "c": 3}), "data.val")
    read = ImageFolder.read

    def read_or_raise(self, i):
        if i == 4:
            raise kind("of another library")
        return read(self, i)

    monkeypatch.setattr(ImageFolder, "read", read_or_raise)
    loader = eval_loader(source, CFG, 4)
    assert evaluate(constant, loader, torch.device("cpu"))["left_out"] == 1
    assert list(loader.left_out) == [4] and "of another library" in loader.left_out[4]
