"""Files of data that are something else, or hold more than their readers see: one line says what they are."""

import bz2
import gzip
import lzma

import pytest
from source_fixtures import labelled, message, write_tar

from scalekd_ds.data.sources.open import open_source

PAGE = b"<!DOCTYPE html><html>404 Not Found</html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"


@pytest.mark.parametrize("name", ["t.tar", "t.tfrecord", "t.csv", "t.parquet"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (gzip.compress, "is compressed (gzip): unpack it."),
        (bz2.compress, "is compressed (bzip2): unpack it."),
        (lzma.compress, "is compressed (xz): unpack it."),
        (lambda data: PAGE, "is a web page, not "),
        (lambda data: POINTER, "git lfs pull"),
        (lambda data: b"", "is empty: fetch it again."),
    ],
)
def test_a_file_that_is_something_else_is_named(tmp_path, name, change, says):
    if name == "t.parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    data = write_tar(tmp_path / "x", labelled([0, 1])).read_bytes()
    (tmp_path / name).write_bytes(change(data))
    assert says in (text := message(tmp_path / name)) and name in text


def test_archives_in_a_tar_are_named(tmp_path):
    tar = write_tar(tmp_path / "ILSVRC2012_img_train.tar", [("n01440764.tar", b"x"), ("n01443537.tar", b"x")])
    assert "has no images, but 2 archives: unpack it" in message(tar)


def test_tars_that_cat_joined_lose_no_image_in_silence(tmp_path):
    first = write_tar(tmp_path / "a.tar", labelled([0, 1])).read_bytes()
    (tmp_path / "joined.tar").write_bytes(first + first)
    assert "has more behind its end, after 4 files, as tars that were joined" in message(tmp_path / "joined.tar")
    # writers fill the last block, some to a megabyte
    (tmp_path / "filled.tar").write_bytes(first + bytes(2**20))
    assert len(open_source(tmp_path / "filled.tar", "data.train")) == 2
