"""What evaluation decodes, resizes and crops: the pixels of torchvision and Pillow, each image once."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from image_fixtures import make_folder, picture
from loading import eval_loader, take, train_loader
from PIL import Image
from torchvision import transforms

from scalekd_ds.config import DataConfig
from scalekd_ds.data import StreamSampler
from scalekd_ds.data.centre_crop import centre_view
from scalekd_ds.data.sources.image_folder import index_folder
from scalekd_ds.inspection.images import Crop, read_image


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_evaluated_pixels_are_torchvisions(source, interpolation):
    cfg = DataConfig(image_size=112, eval_resize=128, interpolation=interpolation)
    mode = getattr(transforms.InterpolationMode, interpolation.upper())
    reference = transforms.Compose([transforms.Resize(128, mode), transforms.CenterCrop(112)])
    images = torch.cat([images for images, _ in eval_loader(source, cfg, 5)])
    for path, ours in zip(source.paths, images, strict=True):
        with Image.open(path) as image:
            theirs = np.asarray(reference(image.convert("RGB")), dtype=np.float32).transpose(2, 0, 1)
        difference = np.abs(ours.numpy() - theirs)
        assert difference.mean() < 0.5, path
        assert difference.max() <= 4.0, path


@pytest.mark.parametrize(("side", "shorter"), [(224, 256), (112, 128)])
def test_sizes_and_places_are_rounded_as_torchvision_rounds_them(tmp_path, side, shorter):
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
    images = torch.cat([images for images, _ in eval_loader(source, cfg, 4)])
    for path, ours in zip(source.paths, images, strict=True):
        theirs = np.asarray(reference(Image.open(path)), dtype=np.float32).transpose(2, 0, 1)
        shown = 255 * read_image(Path(path), Crop(side, shorter, "bilinear")).numpy()
        assert np.abs(shown - theirs).max() < 1e-3, path
        # a place off by one pixel is a mean of 4 to 12 here
        assert np.abs(ours.numpy() - theirs).mean() < 0.5, path
        assert np.abs(ours.numpy() - theirs).max() < 2.5, path


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_line_of_pixels_is_seen_as_torchvision_sees_it_without_being_enlarged_as_a_whole(tmp_path, interpolation):
    """A scan line of 20000x1 would take 4 GB and seconds before its crop."""
    rng = np.random.default_rng(0)
    for name, shape in (("a", (1, 3000)), ("b", (2000, 1)), ("c", (2, 1999)), ("d", (1, 65_500))):
        (tmp_path / name).mkdir()
        Image.fromarray(rng.integers(0, 255, (*shape, 3), dtype=np.uint8)).save(tmp_path / name / "x.png")
    source = index_folder(tmp_path, "data.val")
    cfg = DataConfig(image_size=28, eval_resize=32, interpolation=interpolation)
    assert all(max(centre_view(*shape, 32, 28).size) <= 16 * 28 for shape in ((1, 3000), (2000, 1), (1, 65_500)))
    images, _ = next(iter(eval_loader(source, cfg, len(source))))
    mode = getattr(transforms.InterpolationMode, interpolation.upper())
    reference = transforms.Compose([transforms.Resize(32, mode), transforms.CenterCrop(28)])
    for path, ours in zip(source.paths, images, strict=True):
        theirs = np.asarray(reference(Image.open(path)), dtype=np.float32).transpose(2, 0, 1)
        assert np.abs(ours.numpy() - theirs).mean() < 0.5, path
        assert np.abs(ours.numpy() - theirs).max() <= (1.1 if interpolation == "bilinear" else 25), path
        # and so does a sheet of `inspect`
        shown = 255 * read_image(Path(path), Crop(28, 32, interpolation)).numpy()
        assert np.abs(shown - theirs).max() <= 1.1, path


def test_three_ranks_evaluate_each_image_once(source):
    cfg = DataConfig(image_size=32)
    loaders = [eval_loader(source, cfg, 3, rank, 3) for rank in range(3)]
    assert [len(loader) for loader in loaders] == [2, 2, 2]
    labels = torch.cat([labels for loader in loaders for _, labels in loader])
    assert sorted(labels[labels >= 0].tolist()) == sorted(source.labels.tolist())
    again = torch.cat([labels for _, labels in loaders[0]])
    assert torch.equal(again, torch.cat([labels for _, labels in loaders[0]]))


def test_an_image_of_the_wanted_size_keeps_its_pixels(tmp_path):
    make_folder(tmp_path, {"a": 2, "b": 2}, size=(32, 32), suffix="png")
    for path in tmp_path.rglob("*.png"):
        Image.open(path).resize((32, 32)).save(path)
    source = index_folder(tmp_path, "data.val")
    cfg = DataConfig(image_size=32, random_crop=False, hflip=0.0)
    evaluated, trained = (take(loader(source, cfg, 4), 1)[0][0] for loader in (eval_loader, train_loader))
    order = StreamSampler(4, 0, 4, 4, 0, 1).indices(0, 0)[0]
    for position, path in enumerate(source.paths):
        pixels = np.asarray(Image.open(path).convert("RGB"), dtype=np.float32).transpose(2, 0, 1)
        assert np.abs(evaluated[position].numpy() - pixels).max() < 1e-3
        assert np.abs(trained[order.tolist().index(position)].numpy() - pixels).max() < 1e-3


def test_grey_cmyk_palette_turned_and_misnamed_files_are_as_pillow_converts_them(tmp_path):
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
    images, _ = next(iter(eval_loader(source, cfg, len(source))))
    for path, ours in zip(source.paths, images, strict=True):
        theirs = np.asarray(Image.open(path).convert("RGB"), dtype=np.float32).transpose(2, 0, 1)
        assert np.abs(ours.numpy() - theirs).mean() < 1.0, path
