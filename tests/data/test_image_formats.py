"""Every format and mode in which images come is read as Pillow reads it, whatever decodes it."""

import io

import numpy as np
import torch
from PIL import ExifTags, Image, features

from scalekd_ds.config import DataConfig
from scalekd_ds.data import EvalLoader
from scalekd_ds.data.reader import find_undecodable
from scalekd_ds.data.sources.open import open_source


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned(way):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = way
    return exif


rng = np.random.default_rng(0)
PIXELS = Image.fromarray(rng.integers(0, 255, (8, 9, 3), dtype=np.uint8)).resize((64, 48), Image.Resampling.BICUBIC)
DEEP = Image.fromarray(rng.integers(0, 500, (48, 64)).astype("uint16"))
FORMATS = {
    **{f"{mode}.tif": encoded(PIXELS.convert(mode), "TIFF") for mode in ("RGB", "L", "1", "P", "CMYK", "RGBA", "LAB")},
    **{
        f"{kind}.tiff": encoded(PIXELS, "TIFF", compression=kind) for kind in ("tiff_lzw", "tiff_adobe_deflate", "jpeg")
    },
    "16.tif": encoded(DEEP, "TIFF"),
    "16.png": encoded(DEEP, "PNG"),
    "16.pgm": encoded(DEEP, "PPM"),
    **{f"{mode}.ppm": encoded(PIXELS.convert(mode), "PPM") for mode in ("RGB", "L", "1")},
    "text.ppm": b"P3\n# a comment\n2 2\n255\n" + b" ".join(b"%d" % i for i in range(12)) + b"\n",
    **{f"{mode}.bmp": encoded(PIXELS.convert(mode), "BMP") for mode in ("RGB", "L", "1", "P", "RGBA")},
    **{f"{mode}.webp": encoded(PIXELS.convert(mode), "WEBP", lossless=True) for mode in ("RGB", "RGBA")},
    **{f"{mode}.png": encoded(PIXELS.convert(mode), "PNG") for mode in ("RGB", "L", "1", "P", "RGBA", "LA")},
    **{f"{mode}.jpg": encoded(PIXELS.convert(mode), "JPEG") for mode in ("RGB", "L", "CMYK")},
    # photos that lie on their sides, which neither timm nor torchvision turns
    **{f"turned{way}.jpg": encoded(PIXELS, "JPEG", exif=turned(way)) for way in (2, 3, 6, 8)},
    **{f"turned.{kind}": encoded(PIXELS, kind, exif=turned(6), lossless=True) for kind in ("png", "webp")},
    "turned.tif": encoded(PIXELS, "TIFF", exif=turned(6)),
    # other formats under the name of a JPEG, and the first of several pictures
    **{
        f"{kind}.jpg": encoded(PIXELS, kind)
        for kind in ("PNG", "BMP", "TIFF", "GIF", "JPEG2000", "ICO", "TGA", "PCX", "MPO")
    },
    **({"AVIF.jpg": encoded(PIXELS, "AVIF")} if features.check("avif") else {}),
    "film.jpg": encoded(PIXELS.convert("P"), "GIF", save_all=True, append_images=[DEEP.convert("P")]),
    "film.webp": encoded(PIXELS, "WEBP", save_all=True, append_images=[PIXELS.rotate(180)], lossless=True),
    "pages.tif": encoded(PIXELS, "TIFF", save_all=True, append_images=[PIXELS.rotate(180)]),
    "clear.png": encoded(PIXELS.convert("P"), "PNG", transparency=3),
    "float.tif": encoded(Image.fromarray(rng.random((48, 64), dtype=np.float32) * 255), "TIFF"),
    "big.tif": encoded(PIXELS, "TIFF", big_tiff=True),
    # grey values up to another number than 255
    "100.ppm": b"P6\n4 3\n100\n" + bytes(range(0, 72, 2)),
    "100.pgm": b"P5\n# made by hand\n4 3\n100\n" + bytes(range(0, 96, 8)),
    "painted.pgm": b"P5\n# Created by GIMP version 2.10.36 PNM plug-in, and saved once more\n4 # wide\n3\n60\n"
    + bytes(range(12)),
    "1000.pgm": b"P5\n2 2\n1000\n" + bytes([0, 9, 1, 200, 2, 100, 3, 232]),
    "one.png": encoded(PIXELS.resize((1, 1)), "PNG"),
    "wide.png": encoded(PIXELS.resize((900, 1)), "PNG"),
}


def test_every_extension_is_read_as_pillow_reads_it(tmp_path):
    """All that torchvision's ImageFolder takes, in the modes in which such files come, in one run of the loader."""
    for name, data in FORMATS.items():
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / name).write_bytes(data)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.jpg").write_bytes(FORMATS["RGB.jpg"])
    source = open_source(tmp_path, "data.val")
    assert len(source) == len(FORMATS) + 1
    assert find_undecodable(source, range(len(source))) == {}
    cfg = DataConfig(image_size=32, eval_resize=48, threads=1, interpolation="bilinear")
    loader = EvalLoader(source, cfg, 8, 0, 1, torch.device("cpu"), [0.0] * 3, [1.0] * 3)
    images = torch.cat([batch for batch, _ in loader])
    assert loader.left_out == {}
    same = tmp_path / "as_png"
    for i, path in enumerate(source.paths):
        (same / "ab"[source.labels[i]]).mkdir(parents=True, exist_ok=True)
        Image.open(path).convert("RGB").save(same / "ab"[source.labels[i]] / f"{i:03d}.png")
    again = EvalLoader(open_source(same, "data.val"), cfg, 8, 0, 1, torch.device("cpu"), [0.0] * 3, [1.0] * 3)
    expected = torch.cat([batch for batch, _ in again])
    for i, path in enumerate(source.paths):
        worst = (images[i] - expected[i]).abs().max().item() * 255
        # two decoders of JPEG and of palettes may round otherwise
        assert worst <= (4.0 if path.endswith((".jpg", "jpeg.tiff")) else 1.0), (path, worst)
