"""Every format and mode in which images come is read as Pillow reads it, whatever decodes it."""

import io
import struct
import zlib

import numpy as np
import torch
from loading import take, train_loader
from PIL import ExifTags, Image, features

from scalekd_ds.config import DataConfig
from scalekd_ds.data import EvalLoader
from scalekd_ds.data.reader import find_undecodable
from scalekd_ds.data.sources.open import open_source


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_of(rows, depth, kind, chunks=b""):
    """A PNG of 64 pixels a row, of bits and of a kind that Pillow does not write."""
    head = struct.pack(">IIBBBBB", 64, len(rows), depth, kind, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunks + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bmp_of(bits, compression, data, table=b""):
    """A BMP of 64x48 pixels of a kind that Pillow does not write."""
    start = 54 + len(table)
    head = struct.pack("<IiiHHIIiiII", 40, 64, 48, 1, bits, compression, len(data), 0, 0, len(table) // 4, 0)
    return b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + head + table + data


def patched(data, at, new):
    return data[:at] + new + data[at + len(new) :]


def turned(way):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = way
    return exif


rng = np.random.default_rng(0)
PIXELS = Image.fromarray(rng.integers(0, 255, (8, 9, 3), dtype=np.uint8)).resize((64, 48), Image.Resampling.BICUBIC)
WORDS = rng.integers(0, 2**16, (48, 64)).astype(">u2")
CMYK = encoded(PIXELS.convert("CMYK"), "JPEG")
# the segment in which Adobe's programs say that the colours of a JPEG are inverted
ADOBE = CMYK.index(b"\xff\xee")
PNG, JPEG = encoded(PIXELS, "PNG"), encoded(PIXELS, "JPEG")
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
    # of inks, in other ways than Pillow writes them
    "plain_inks.jpg": CMYK[:ADOBE] + CMYK[ADOBE + 16 :],
    "ycck.jpg": patched(CMYK, ADOBE + 15, b"\2"),
    "16_clear.png": png_of(WORDS, 16, 0, chunk(b"tRNS", b"\1\2")),
    "16_colours.png": png_of(WORDS.reshape(16, 192), 16, 2),
    "5_bits.bmp": bmp_of(16, 0, WORDS.tobytes()),
    "6_bits.bmp": bmp_of(16, 3, WORDS.tobytes(), struct.pack("<III", 0xF800, 0x7E0, 0x1F)),
    "runs.bmp": bmp_of(4, 2, bytes([64, 0x13, 0, 0]) * 48 + b"\0\1", bytes(range(64))),
    **{f"2000_{mode}.jpg": encoded(PIXELS.convert(mode), "JPEG2000") for mode in ("LA", "YCbCr", "RGBA")},
    "2000_16.jpg": encoded(DEEP, "JPEG2000"),
    "2000_stream.jpg": encoded(PIXELS.convert("L"), "JPEG2000", no_jp2=True),
    "joined.ppm": b"P1\n4 3\n010110100011\n",
    "no_newline.pgm": b"P2\n4 3\n255\n" + b" ".join(b"%d" % (20 * i) for i in range(12)),
    # whole but for what comes behind the pixels
    "no_end.png": PNG[:-12],
    "half_an_end.png": PNG[:-3],
    "checksum.png": patched(PNG, len(PNG) - 16, bytes([PNG[-16] ^ 255])),
    "film_behind.jpg": JPEG + bytes(100_000),
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
        pixels = Image.open(path).convert("RGB")
        pixels.info = {}
        pixels.save(same / "ab"[source.labels[i]] / f"{i:03d}.png")
    again = EvalLoader(open_source(same, "data.val"), cfg, 8, 0, 1, torch.device("cpu"), [0.0] * 3, [1.0] * 3)
    expected = torch.cat([batch for batch, _ in again])
    for i, path in enumerate(source.paths):
        worst = (images[i] - expected[i]).abs().max().item() * 255
        # two decoders of JPEG and of palettes may round otherwise
        assert worst <= (4.0 if path.endswith((".jpg", "jpeg.tiff")) else 1.0), (path, worst)


# no image for Pillow either, and what each is
NO_IMAGES = {
    "12_bits.jpg": (patched(JPEG, JPEG.index(b"\xff\xc0") + 4, b"\x0c"), "is a JPEG of 12 bits a colour"),
    "page.jpg": (b"\n<!DOCTYPE html><title>404", "is a web page"),
    "denied.png": (b"<?xml version='1.0'?><Error><Code>AccessDenied", "is a web page"),
    "pointer.jpg": (b"version https://git-lfs.github.com/spec/v1\noid", "is a git-lfs pointer, not the images"),
    "packed.jpg": (b"\x1f\x8b" + bytes(90), "is compressed (gzip)"),
    "half.tif": (encoded(PIXELS, "TIFF", compression="tiff_lzw")[:500], "begins as a TIFF"),
    "no_height.jpg": (patched(JPEG, JPEG.index(b"\xff\xc0") + 5, b"\0\0"), "begins as a JPEG"),
    "half.png": (PNG[: len(PNG) // 2], "is cut off"),
    "text.jpg": (b"not an image", "is no image"),
}


def loaded(place):
    source = open_source(place, "data.val")
    cfg = DataConfig(image_size=32, eval_resize=48, threads=1, interpolation="bilinear")
    loader = EvalLoader(source, cfg, 4, 0, 1, torch.device("cpu"), [0.0] * 3, [1.0] * 3)
    return torch.cat([batch for batch, _ in loader]), {source.name(i): why for i, why in loader.left_out.items()}


def test_what_is_no_image_is_called_what_it_is(tmp_path):
    for name, (data, _) in NO_IMAGES.items():
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / name).write_bytes(data)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "good.jpg").write_bytes(JPEG)
    _, left_out = loaded(tmp_path)
    assert len(left_out) == len(NO_IMAGES)
    for name, (_, says) in NO_IMAGES.items():
        assert says in left_out[str(tmp_path / "a" / name)], name
    source = open_source(tmp_path, "data.val")
    assert {source.name(i): why for i, why in find_undecodable(source, range(len(source))).items()} == left_out


def test_an_image_that_dali_alone_refuses_is_read_by_pillow(tmp_path, monkeypatch, capfd):
    """Of a kind that nobody knew DALI to refuse: its pipeline starts anew, and the image is neither replaced nor left out."""
    for name in ("5_bits.bmp", "runs.bmp", "2000_LA.jpg", "joined.ppm", "no_newline.pgm", "RGB.jpg", "no_end.png"):
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / name).write_bytes(FORMATS[name])
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.png").write_bytes(PNG)
    expected, _ = loaded(tmp_path)
    monkeypatch.setattr("scalekd_ds.data.reader._is_dalis", lambda data: True)
    images, left_out = loaded(tmp_path)
    assert left_out == {} and torch.equal(images, expected)
    batches = train_loader(open_source(tmp_path, "data.train"), DataConfig(image_size=32), micro=4)
    assert len(take(batches, 6)) == 6 and len(batches.bad_files) == 0
