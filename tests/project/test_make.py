"""What `make` says where a machine lacks something: one line, and what to do."""

import shutil
import subprocess

import pytest
from launching import ROOT, make_errors


def test_an_old_python(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.2 && exit\nexit 1\n')
    python.chmod(0o755)
    lines = make_errors("venv", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}")
    assert lines == [f"error: {python} is Python 3.9.2: Python 3.11 or newer is needed (make PYTHON=python3.12)"]
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize("version", ["2.9.1", "1.13", "none"])
def test_an_old_torch(version):
    assert make_errors("venv", f"TORCH={version}") == [f"error: TORCH is {version}: torch 2.11 or newer is needed"]
    assert not (ROOT / f".venv-torch{version}").exists()


def test_an_environment_in_a_path_with_a_blank(tmp_path):
    checkout = tmp_path / "two words"
    checkout.mkdir()
    for name in ("Makefile", "setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, checkout)
    (line,) = make_errors("venv", cwd=checkout)
    assert line.startswith(f"error: '{checkout / '.venv'}' has a blank") and line.endswith("make VENV=FOLDER")
    assert not (checkout / ".venv").exists()


def test_a_missing_compiler():
    lines = make_errors("compiler", "CXX=no-such-compiler", "APT=", "STAMP=")
    assert lines == ["error: DeepSpeed needs a C++ compiler and Python's headers (Debian: g++ python3-dev)"]


def test_a_full_disk(tmp_path):
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted: {mounted.stderr.strip()}")
    try:
        lines = make_errors("venv", f"VENV={tmp_path / 'venv'}", "APT=")
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    assert lines == [f"error: the disk that holds {tmp_path / 'venv'} is full: free 8 GB there"]


def test_packages_that_pip_does_not_find(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    (line,) = make_errors("venv", f"VENV={tmp_path / 'venv'}")
    assert line.startswith(f"error: pip could not fill {tmp_path / 'venv'}: Could not find a version that satisfies")
