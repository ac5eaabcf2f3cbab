"""The size of an encoded image is Pillow's, of every format and for every way to write a JPEG."""

import io

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError

from scalekd_ds.data.headers import encoded_size


def encode(kind, height=37, width=53, mode="RGB", **options):
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


def exif_with_thumbnail():
    exif = Image.Exif()
    exif[274] = 6
    # a whole JPEG of another size, as cameras keep it in front of the picture
    exif[37500] = encode("JPEG", 8, 9)
    return exif


def with_filling(jpeg):
    """Bytes of filling before the second marker, which the format allows."""
    return jpeg[:2] + b"\xff\xff\xff" + jpeg[2:]


IMAGES = {
    "plain": encode("JPEG"),
    "grey": encode("JPEG", mode="L"),
    "CMYK": encode("JPEG", mode="CMYK"),
    "progressive": encode("JPEG", progressive=True),
    "optimised": encode("JPEG", optimize=True),
    "restart markers": encode("JPEG", restart_marker_rows=1),
    "a thumbnail inside": encode("JPEG", exif=exif_with_thumbnail()),
    "a comment": encode("JPEG", comment=b"\xff\xc0\x00\x11\x08\x00\x01\x00\x01"),
    "a colour profile": encode("JPEG", icc_profile=b"\xff\xc0" * 40_000),
    "filling": with_filling(encode("JPEG")),
    "one pixel": encode("JPEG", 1, 1),
    "the widest": encode("JPEG", 1, 65_500),
    "the highest": encode("JPEG", 65_500, 1),
    "PNG": encode("PNG"),
    "WebP": encode("WEBP"),
    "lossless WebP": encode("WEBP", lossless=True),
    "BMP": encode("BMP"),
    "TIFF": encode("TIFF"),
    "PPM": encode("PPM"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_the_size_is_that_of_pillow(name):
    with Image.open(io.BytesIO(IMAGES[name])) as image:
        assert encoded_size(memoryview(IMAGES[name])) == (image.height, image.width)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 10, 20])
def test_a_jpeg_that_ends_before_its_size_is_no_image(count):
    with pytest.raises((UnidentifiedImageError, OSError)):
        encoded_size(memoryview(encode("JPEG")[:count]))


def test_the_limit_of_pillow_holds(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 900)
    with pytest.raises(Image.DecompressionBombError):
        encoded_size(memoryview(IMAGES["plain"]))
