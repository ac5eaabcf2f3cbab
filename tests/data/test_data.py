"""Real DALI against Pillow and torchvision, and what a user can get wrong about a folder."""

import gc
import io
import itertools
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from image_fixtures import make_folder, picture
from PIL import Image
from torchvision import transforms

from scalekd_ds.config import DataConfig
from scalekd_ds.data import EvalLoader, StreamSampler, TrainLoader, augment, reader
from scalekd_ds.data.sources.image_folder import index_folder
from scalekd_ds.data.sources.source import check_same_classes, subset
from scalekd_ds.errors import UserError

CPU = torch.device("cpu")
# identity normalisation in units of 0..255
RAW = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("images"), {"a": 5, "b": 7}, size=(200, 260))


@pytest.fixture(scope="module")
def source(folder):
    return index_folder(folder, "data.train")


def train_loader(source, cfg, micro=4, rank=0, world_size=1, seed=0, start_step=0, batch=None, **pixels):
    sampler = StreamSampler(len(source), seed, batch or micro * world_size, micro, rank, world_size)
    return TrainLoader(source, cfg, sampler, CPU, start_step=start_step, **(pixels or RAW))


def take(loader, count):
    batches = iter(loader)
    return [next(batches) for _ in range(count)]


def test_index(source, folder):
    assert source.classes == ["a", "b"]
    assert len(source.paths) == 12
    assert source.labels.tolist() == [0] * 5 + [1] * 7
    assert source.paths == sorted(source.paths)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_evaluation_equals_torchvision(source, interpolation):
    cfg = DataConfig(image_size=112, eval_resize=128, interpolation=interpolation)
    mode = getattr(transforms.InterpolationMode, interpolation.upper())
    reference = transforms.Compose([transforms.Resize(128, mode), transforms.CenterCrop(112)])
    images = torch.cat([images for images, _ in EvalLoader(source, cfg, 5, 0, 1, CPU, **RAW)])
    for path, ours in zip(source.paths, images, strict=True):
        with Image.open(path) as image:
            theirs = np.asarray(reference(image.convert("RGB")), dtype=np.float32).transpose(2, 0, 1)
        difference = np.abs(ours.numpy() - theirs)
        assert difference.mean() < 0.5, path
        assert difference.max() <= 4.0, path


@pytest.mark.parametrize(("side", "shorter"), [(224, 256), (112, 128)])
def test_evaluation_rounds_sizes_and_places_as_torchvision(tmp_path, side, shorter):
    # longer sides that come out at x.2, x.5 and x.7 pixels, and margins that are odd
    shapes = [(375, 500), (500, 375), (100, 120), (1000, 700), (225, 300), (333, 500), (256, 256)]
    rng = np.random.default_rng(0)
    for position, (height, width) in enumerate(shapes):
        folder = tmp_path / "ab"[position % 2]
        folder.mkdir(exist_ok=True)
        picture(rng, height, width).save(folder / f"{height}x{width}.png")
    source = index_folder(tmp_path, "data.val")
    reference = transforms.Compose([transforms.Resize(shorter), transforms.CenterCrop(side)])
    cfg = DataConfig(image_size=side, eval_resize=shorter)
    images = torch.cat([images for images, _ in EvalLoader(source, cfg, 4, 0, 1, CPU, **RAW)])
    for path, ours in zip(source.paths, images, strict=True):
        theirs = np.asarray(reference(Image.open(path)), dtype=np.float32).transpose(2, 0, 1)
        # a place off by one pixel is a mean of 4 to 12 here
        assert np.abs(ours.numpy() - theirs).mean() < 0.5, path
        assert np.abs(ours.numpy() - theirs).max() < 2.5, path


def test_evaluation_counts_each_image_once_over_three_ranks(source):
    cfg = DataConfig(image_size=32)
    loaders = [EvalLoader(source, cfg, 3, rank, 3, CPU, **RAW) for rank in range(3)]
    assert [len(loader) for loader in loaders] == [2, 2, 2]
    labels = torch.cat([labels for loader in loaders for _, labels in loader])
    assert sorted(labels[labels >= 0].tolist()) == sorted(source.labels.tolist())
    again = torch.cat([labels for _, labels in loaders[0]])
    assert torch.equal(again, torch.cat([labels for _, labels in loaders[0]]))


def test_images_of_their_own_size_are_left_alone(tmp_path):
    make_folder(tmp_path, {"a": 2, "b": 2}, size=(32, 32), suffix="png")
    for path in tmp_path.rglob("*.png"):
        Image.open(path).resize((32, 32)).save(path)
    source = index_folder(tmp_path, "data.val")
    cfg = DataConfig(image_size=32, random_crop=False, hflip=0.0)
    (evaluated, _), (trained, _) = next(iter(EvalLoader(source, cfg, 4, 0, 1, CPU, **RAW))), take(
        train_loader(source, cfg), 1
    )[0]  # fmt: skip
    order = StreamSampler(4, 0, 4, 4, 0, 1).indices(0, 0)[0]
    for position, path in enumerate(source.paths):
        pixels = np.asarray(Image.open(path).convert("RGB"), dtype=np.float32).transpose(2, 0, 1)
        assert np.abs(evaluated[position].numpy() - pixels).max() < 1e-3
        assert np.abs(trained[order.tolist().index(position)].numpy() - pixels).max() < 1e-3


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_training_pixels_are_the_drawn_crop_and_flip(source, interpolation):
    cfg = DataConfig(image_size=64, crop_scale=(0.3, 1.0), interpolation=interpolation)
    images, labels = take(train_loader(source, cfg, micro=12, seed=5), 1)[0]
    indices, epochs = StreamSampler(12, 5, 12, 12, 0, 1).indices(0, 0)
    flips = augment.uniform(5, epochs, indices, 1) < 0.5
    assert 0 < flips.sum() < 12
    for ours, label, index, epoch, flip in zip(images, labels, indices, epochs, flips, strict=True):
        with Image.open(source.paths[index]) as image:
            rng = augment.generator(5, int(epoch), int(index))
            y, x, h, w = augment.random_resized_crop(rng, image.height, image.width, cfg.crop_scale, cfg.crop_ratio)
            expected = (
                image.convert("RGB")
                .crop((x, y, x + w, y + h))
                .resize((64, 64), Image.Resampling[interpolation.upper()])
            )
        expected = np.asarray(expected, dtype=np.float32).transpose(2, 0, 1)
        expected = expected[:, :, ::-1] if flip else expected
        difference = np.abs(ours.numpy() - expected)
        assert difference.mean() < 0.3 and difference.max() <= 4, (difference.mean(), difference.max())
        assert label == source.labels[index]


def test_normalisation_and_types(source):
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)
    cfg = DataConfig(image_size=32)
    (raw, labels), (ours, _) = take(train_loader(source, cfg), 1)[0], take(
        train_loader(source, cfg, mean=mean, std=std), 1
    )[0]  # fmt: skip
    expected = (raw / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert torch.allclose(ours, expected, atol=1e-4)
    assert ours.dtype == torch.float32 and labels.dtype == torch.int64


def test_resuming_is_bit_identical(source):
    cfg = DataConfig(image_size=48)
    whole = take(train_loader(source, cfg), 9)
    rest = take(train_loader(source, cfg, start_step=5), 4)
    for (images, labels), (images_again, labels_again) in zip(whole[5:], rest, strict=True):
        assert torch.equal(images, images_again)
        assert torch.equal(labels, labels_again)


def test_resuming_inside_an_accumulated_step_starts_at_its_first_micro_batch(source):
    cfg = DataConfig(image_size=48)
    whole = take(train_loader(source, cfg, micro=2, batch=4), 8)
    rest = take(train_loader(source, cfg, micro=2, batch=4, start_step=2), 4)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(whole[4:], rest, strict=True))


def test_two_ranks_see_what_one_sees(source):
    cfg = DataConfig(image_size=48)
    one = take(train_loader(source, cfg, micro=4), 4)
    two = [take(train_loader(source, cfg, micro=2, rank=rank, world_size=2), 4) for rank in range(2)]
    for step in range(4):
        assert torch.equal(one[step][0], torch.cat([two[0][step][0], two[1][step][0]]))


def test_an_epoch_draws_new_crops(source):
    cfg = DataConfig(image_size=48, hflip=0.0)
    batches = take(train_loader(source, cfg, micro=12), 2)
    order = [StreamSampler(12, 0, 12, 12, 0, 1).indices(step, 0)[0] for step in range(2)]
    first, second = (batch[0][np.argsort(o)] for batch, o in zip(batches, order, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_tensors_stay_valid_while_the_pipeline_goes_on(source):
    batches = iter(train_loader(source, DataConfig(image_size=32)))
    first, _ = next(batches)
    copy = first.clone()
    for _ in range(6):
        next(batches)
    assert torch.equal(first, copy)


def test_crops_are_distributed_as_torchvisions():
    height, width, scale, ratio, count = 300, 500, (0.08, 1.0), (3 / 4, 4 / 3), 4000
    ours = np.array(
        [augment.random_resized_crop(augment.generator(0, 0, i), height, width, scale, ratio) for i in range(count)]
    )
    blank = Image.new("RGB", (width, height))
    torch.manual_seed(0)
    theirs = np.array([transforms.RandomResizedCrop.get_params(blank, scale, ratio) for _ in range(count)])

    def moments(boxes):
        y, x, h, w = boxes.T.astype(np.float64)
        area, aspect = h * w / (height * width), np.log(w / h)
        free_y, free_x = np.maximum(height - h, 1), np.maximum(width - w, 1)
        return np.array(
            [area.mean(), area.std(), aspect.mean(), aspect.std(), (y / free_y).mean(), (x / free_x).mean()]
        )

    # the standard error of the means is below 0.005 at 4,000 draws
    assert np.abs(moments(ours) - moments(theirs)).max() < 0.02
    assert (ours[:, 0] + ours[:, 2] <= height).all() and (ours[:, 1] + ours[:, 3] <= width).all()


def test_uniform_draws_are_uniform_and_independent():
    indices = np.arange(100_000)
    draws = augment.uniform(3, np.zeros_like(indices), indices, 1)
    histogram = np.histogram(draws, 20, (0, 1))[0]
    # chi-squared with 19 degrees of freedom: 43.8 is its 0.1% tail
    assert ((histogram - 5000) ** 2 / 5000).sum() < 43.8
    for other in (
        augment.uniform(3, np.ones_like(indices), indices, 1),
        augment.uniform(4, np.zeros_like(indices), indices, 1),
        augment.uniform(3, np.zeros_like(indices), indices, 2),
        np.roll(draws, 1),
    ):
        assert abs(np.corrcoef(draws, other)[0, 1]) < 0.01


def test_odd_files_are_as_pillow_converts_them(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    base = picture(rng, 64, 64)
    base.convert("L").save(tmp_path / "a" / "grey.jpg", quality=95)
    base.convert("CMYK").save(tmp_path / "a" / "cmyk.jpg", quality=95)
    base.convert("P").save(tmp_path / "a" / "palette.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation, which torchvision's ImageFolder does not follow either
    base.save(tmp_path / "b" / "turned.jpg", quality=95, exif=turned)
    base.save(tmp_path / "a" / "plain.png")
    base.save(tmp_path / "b" / "web.webp", lossless=True)
    data = io.BytesIO()
    base.save(data, "PNG")
    (tmp_path / "b" / "png_named.jpg").write_bytes(data.getvalue())
    source = index_folder(tmp_path, "data.val")
    cfg = DataConfig(image_size=64, eval_resize=64)
    images, _ = next(iter(EvalLoader(source, cfg, len(source), 0, 1, CPU, **RAW)))
    for path, ours in zip(source.paths, images, strict=True):
        theirs = np.asarray(Image.open(path).convert("RGB"), dtype=np.float32).transpose(2, 0, 1)
        assert np.abs(ours.numpy() - theirs).mean() < 1.0, path


@pytest.mark.parametrize("damage", ["text", "empty", "cut"])
def test_a_damaged_image_is_named(tmp_path, damage):
    make_folder(tmp_path, {"a": 3, "b": 3})
    bad = tmp_path / "b" / "001.jpg"
    bad.write_bytes({"text": b"not an image", "empty": b"", "cut": bad.read_bytes()[:300]}[damage])
    source = index_folder(tmp_path, "data.train")
    with pytest.raises(UserError) as error:
        for _ in EvalLoader(source, DataConfig(image_size=32), 6, 0, 1, CPU, **RAW):
            pass
    assert str(bad) in str(error.value)


@pytest.mark.parametrize("damage", ["cut", "gif"])
@pytest.mark.parametrize("random_crop", [True, False])
def test_a_damaged_training_image_is_named_in_a_later_batch(tmp_path, damage, random_crop):
    make_folder(tmp_path, {"a": 12, "b": 12})
    source = index_folder(tmp_path, "data.train")
    # in the third batch of four, while DALI works three ahead
    bad = Path(source.paths[StreamSampler(24, 0, 4, 4, 0, 1).indices(2, 0)[0][1]])
    data = io.BytesIO()
    picture(np.random.default_rng(0), 40, 40).save(data, "GIF")
    bad.write_bytes({"cut": bad.read_bytes()[:700], "gif": data.getvalue()}[damage])
    with pytest.raises(UserError) as error:
        take(train_loader(source, DataConfig(image_size=32, prefetch=3, random_crop=random_crop)), 6)
    assert str(bad) in str(error.value) and "\n" not in str(error.value)


def test_threads_end_with_the_iterator_and_with_the_loader(source):
    def tasks():
        return len(list(Path("/proc/self/task").iterdir()))

    cfg = DataConfig(image_size=32)
    take(train_loader(source, cfg), 1)
    gc.collect()
    before = tasks()
    loader = train_loader(source, cfg)
    batches = iter(loader)
    next(batches)
    assert tasks() > before
    loader.close()
    assert next(batches, None) is None
    batches = iter(loader)
    next(batches)
    del batches, loader
    list(EvalLoader(source, cfg, 4, 0, 1, CPU, **RAW))
    gc.collect()
    assert tasks() <= before
    assert not [t for t in threading.enumerate() if t.name.startswith("read-images")]


def test_small_sets_are_read_once_and_large_ones_are_not_kept(tmp_path):
    make_folder(tmp_path, {"a": 3, "b": 3})
    source = index_folder(tmp_path, "data.train")
    paths = source.paths
    small, large = reader.Reader(source, keep_bytes=2**20), reader.Reader(source, keep_bytes=1000)
    first = [each.encoded(0) for each in (small, large)]
    assert np.array_equal(*first)
    Path(paths[0]).unlink()
    assert np.array_equal(small.encoded(0), first[0])
    with pytest.raises(UserError, match="cannot be read"):
        large.encoded(0)


def test_slow_storage_is_read_while_the_caller_computes(source, monkeypatch):
    fromfile = np.fromfile

    def slow(*args, **kwargs):
        time.sleep(0.01)
        return fromfile(*args, **kwargs)

    monkeypatch.setattr(np, "fromfile", slow)
    loader = train_loader(source, DataConfig(image_size=32, threads=4), micro=12)
    loader._reader = reader.Reader(source, keep_bytes=0)
    batches = iter(loader)
    next(batches)
    waits = []
    for _ in range(8):
        time.sleep(0.15)
        start = time.perf_counter()
        next(batches)
        waits.append(time.perf_counter() - start)
    # 12 files take 120 ms to read; half of that leaves room for a busy machine
    assert np.median(waits) < 0.06


def test_a_file_that_vanished_is_named(tmp_path):
    make_folder(tmp_path, {"a": 3, "b": 3})
    source = index_folder(tmp_path, "data.train")
    (tmp_path / "a" / "002.jpg").unlink()
    with pytest.raises(UserError, match=r"002.jpg.*cannot be read: No such file"):
        list(EvalLoader(source, DataConfig(image_size=32), 6, 0, 1, CPU, **RAW))


@pytest.mark.parametrize("how", ["removed", "emptied"])
def test_a_disk_that_vanished_is_no_bad_file(tmp_path, how):
    folder = make_folder(tmp_path / "train", {"a": 30, "b": 30})
    source = index_folder(folder, "data.train")
    loader = TrainLoader(source, DataConfig(image_size=32, keep_mb=0), StreamSampler(60, 0, 6, 6, 0, 1), CPU, **RAW)
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


def test_folders_that_may_not_be_read(tmp_path):
    folder = make_folder(tmp_path / "train", {"a": 2, "b": 2})
    # pytest's own folders are its user's alone
    for parent in (tmp_path, *tmp_path.parents):
        if parent.stat().st_uid == os.geteuid() and parent.name.startswith(("pytest-", "popen-", "test_")):
            parent.chmod(0o755)
    (folder / "b").chmod(0)
    mine = os.geteuid()
    if mine == 0:
        # root may read everything
        os.seteuid(65534)
    try:
        with pytest.raises(UserError, match=r"data.train: the folder .*train/b' cannot be read: Permission denied"):
            index_folder(folder, "data.train")
    finally:
        os.seteuid(mine)
        (folder / "b").chmod(0o755)


def test_a_loader_does_not_grow(tmp_path):
    """Two thousand images after the first six hundred; `benchmarks/loader.py --soak 50000` is the long form."""
    source = index_folder(make_folder(tmp_path, {"a": 20, "b": 20}, (160, 200)), "data.train")
    cfg = DataConfig(image_size=64, auto_augment="rand-m9-n2-mstd0.5-inc1", random_erasing=0.5, keep_mb=0)
    batches = iter(TrainLoader(source, cfg, StreamSampler(len(source), 0, 20, 20, 0, 1), CPU, **RAW))
    process, resident = psutil.Process(), []
    for number in range(130):
        next(batches)
        if number % 10 == 9:
            resident.append(process.memory_info().rss / 2**20)
    assert max(resident[-5:]) - max(resident[2:7]) < 8, resident


def test_folders_that_cannot_be_used(tmp_path):
    make_folder(tmp_path / "train", {"a": 2, "b": 2})
    with pytest.raises(UserError, match=r"data.train: the folder .*trian.* does not exist. Did you mean 'train'"):
        index_folder(tmp_path / "trian", "data.train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no class folders"):
        index_folder(tmp_path / "empty", "data.train")
    make_folder(tmp_path / "one", {"only": 2})
    with pytest.raises(UserError, match="has one class, 'only'"):
        index_folder(tmp_path / "one", "data.train")
    (tmp_path / "train" / "c").mkdir()
    with pytest.raises(UserError, match=r"the class folder .*c' has no images"):
        index_folder(tmp_path / "train", "data.train")
    make_folder(tmp_path / "val", {"a": 2, "bb": 2})
    (tmp_path / "train" / "c").rmdir()
    with pytest.raises(UserError, match=r"different classes: 1 only in .*val \(bb\)"):
        check_same_classes(index_folder(tmp_path / "train", "t"), index_folder(tmp_path / "val", "v"))


def test_a_subset_is_drawn_with_the_seed(source):
    first, again, other = (subset(source, 6, seed) for seed in (0, 0, 1))
    assert first.paths == again.paths != other.paths
    assert len(first) == 6 and set(first.paths) <= set(source.paths)
    assert first.labels.tolist() == [source.labels[source.paths.index(p)] for p in first.paths]
    with pytest.raises(UserError, match=r"data.train_images is 13: .* has 12 images"):
        subset(source, 13, 0)


def test_prefetch_depths_do_not_change_the_batches(source):
    cfg = DataConfig(image_size=32)
    one, four = (take(train_loader(source, replace(cfg, prefetch=depth)), 5) for depth in (1, 4))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(one, four, strict=True))
