"""Wheels go to a machine without a network in pieces: packed, cut, joined and installed, with two small wheels made here."""

import importlib
import json
import subprocess
import sys

import pytest
from launching import LIMIT, ROOT

sys.path.append(str(ROOT / "benchmarks"))
pack_wheels = importlib.import_module("pack_wheels")
SCRIPT = ROOT / "benchmarks" / "pack_wheels.py"


def run(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)


def make_package(folder, name, size):
    """A source tree of a package that holds so many bytes that do not shrink."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(f"NAME = {name!r}\n")
    (folder / name / "noise.bin").write_bytes(bytes((i * i * 2654435761 >> 13) & 255 for i in range(size)))
    (folder / "pyproject.toml").write_text(
        f'[project]\nname = "{name}"\nversion = "1.0"\n'
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        f'[tool.setuptools]\npackages = ["{name}"]\n[tool.setuptools.package-data]\n{name} = ["*.bin"]\n'
    )
    return folder


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """Built as a package that comes as source is, without a network."""
    made = tmp_path_factory.mktemp("wheels")
    sources = [make_package(made / f"source-{name}", name, size) for name, size in (("large", 30_000), ("small", 100))]
    return pack_wheels.download([str(source) for source in sources], made / "out", ["--no-index"])


def test_pieces_fit_a_transfer_and_are_joined_in_any_order(wheels, tmp_path):
    assert [wheel.name for wheel in wheels] == ["large-1.0-py3-none-any.whl", "small-1.0-py3-none-any.whl"]
    folders = pack_wheels.cut(wheels, tmp_path / "pieces", piece=8_000, transfer=17_000)
    assert len(folders) > 1
    for folder in folders:
        assert sum(p.stat().st_size for p in folder.iterdir() if p.name != pack_wheels.MANIFEST) <= 17_000
    site = tmp_path / "site"
    for folder in reversed(folders[1:]):
        done = run("join", folder, "--into", site)
        assert done.returncode == 0 and done.stdout.startswith("not yet there: "), done.stderr
        assert not site.exists()
    done = run("join", folders[0], "--into", site)
    assert done.stdout == f"installed: set PYTHONPATH={site}\n", done.stderr
    assert (site / "large" / "noise.bin").stat().st_size == 30_000
    assert "NAME = 'small'" in (site / "small" / "__init__.py").read_text()


def test_a_damaged_piece_is_refused(wheels, tmp_path):
    (folder,) = pack_wheels.cut(wheels, tmp_path / "pieces")
    assert len(json.loads((folder / pack_wheels.MANIFEST).read_text())) == 2
    (folder / wheels[0].name).write_bytes(b"cut off")
    done = run("join", folder, "--into", tmp_path / "site")
    assert done.returncode == 1
    assert done.stderr == (
        f"error: {folder / wheels[0].name} is damaged: its SHA-256 is not that of the manifest; copy it again.\n"
    )


def test_wrong_folders_are_named(wheels, tmp_path):
    done = run("join", tmp_path, "--into", tmp_path / "site")
    assert done.returncode == 1 and "it must be a folder of pieces from `pack`, with manifest.json" in done.stderr
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="it must be an empty or a new folder"):
        pack_wheels.cut(wheels, tmp_path / "full")


def test_what_pip_cannot_find_is_named(tmp_path):
    with pytest.raises(ValueError, match="pip wheel failed: "):
        pack_wheels.download(["no-such-package-here"], tmp_path, ["--no-index"])
