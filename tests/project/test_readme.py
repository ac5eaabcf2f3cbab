"""The README's code runs as it is written, and its commands name what exists."""

import re

import pytest
from launching import ROOT

from scalekd_ds.recipes import RECIPES

TEXT = (ROOT / "README.md").read_text()


def test_the_loop_of_ones_own(tmp_path, monkeypatch, capsys):
    code = next(block for block in re.findall(r"```python\n(.*?)```", TEXT, re.S) if "ScaleKD(" in block)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "student.pt").stat().st_size > 10_000_000
    assert "projectors" in capsys.readouterr().out


def test_files_recipes_and_targets_exist():
    for script in set(re.findall(r"launch/\w+(?:\.py)?", TEXT)):
        assert (ROOT / script).exists(), script
    for recipe in re.findall(r"--recipe ([\w-]+)", TEXT):
        assert recipe in RECIPES
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([\w-]+)", TEXT):
        assert re.search(rf"^{target}:", makefile, re.M), target


@pytest.mark.parametrize("words", ["make quickstart", "make test"])
def test_it_opens_with_the_two_commands(words):
    assert words in "\n".join(TEXT.splitlines()[:10])
