"""Installs of every kind find the kernels and the DeepSpeed files, wherever Python is started."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import Distribution, distributions
from pathlib import Path

import pytest
from launching import ROOT

# neither imported nor looked for on the path: both make setuptools swap distutils, which inductor then trips over
INSTALLED = {distribution.name for distribution in distributions()}
for tool in ("pip", "setuptools"):
    if tool not in INSTALLED:
        pytest.skip(f"needs {tool} to install with", allow_module_level=True)

LOOK = """
import json, scalekd_ds.kernels
from importlib.resources import files
configs = sorted(f.name for f in (files("scalekd_ds") / "ds_configs").iterdir() if f.name.endswith(".json"))
print(json.dumps({"package": scalekd_ds.__file__, "kernels": scalekd_ds.kernels.__file__, "ds_configs": configs}))
"""


def copy_of_repo(folder: Path) -> Path:
    """What a clone would hold, symlinks kept: builds write into the tree they build."""
    copy = folder / "repo"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "CITATION.cff", "CHANGELOG.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    for name in ("scalekd_ds", "kernels", "ds_configs"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module", params=["plain", "editable"])
def install(request, tmp_path_factory):
    """(python, site-packages, repository) of an environment of its own that borrows this one's dependencies."""
    folder = tmp_path_factory.mktemp(request.param)
    repo = copy_of_repo(folder)
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "venv")}))
    # a path in a .pth file comes after site's own, and .pth files there are not read: neither this environment's copy
    # of the package nor its editable link can pass for the one under test
    # (as code in ASCII, since the file is read in the locale's encoding)
    borrowed = ascii([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    (site / "borrowed.pth").write_text(f"import sys; sys.path += {borrowed}\n")
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check"]
    command += ["--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed"]
    command += ["--editable", repo] if request.param == "editable" else [repo]
    built = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert built.returncode == 0, built.stdout + built.stderr
    return request.param, python, site, repo


@pytest.mark.parametrize(
    ("install", "start"),
    [
        ("plain", "elsewhere"),
        ("editable", "root"),
        pytest.param("plain", "root", marks=pytest.mark.slow),
        pytest.param("editable", "elsewhere", marks=pytest.mark.slow),
    ],
    indirect=["install"],
)
def test_an_install_finds_its_own_kernels_and_ds_configs(install, start, tmp_path):
    kind, python, site, repo = install
    # PyPI has a package of this name, widely installed
    decoy = tmp_path / "others" / "kernels"
    decoy.mkdir(parents=True)
    (decoy / "__init__.py").write_text("raise ImportError('not our kernels')\n")
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    env["PYTHONPATH"] = str(decoy.parent)
    cwd = repo if start == "root" else tmp_path
    run = subprocess.run([python, "-c", LOOK], cwd=cwd, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout.splitlines()[-1])
    home = site if kind == "plain" and start == "elsewhere" else repo
    assert Path(seen["package"]) == home / "scalekd_ds" / "__init__.py"
    assert Path(seen["kernels"]) == home / "scalekd_ds" / "kernels" / "__init__.py"
    assert seen["ds_configs"] == sorted(f.name for f in (ROOT / "ds_configs").glob("*.json"))
    assert seen["ds_configs"]


def test_the_command_works_from_anywhere(install, tmp_path):
    """No launch/ folder is near, and the environment is not activated."""
    _, python, _, _ = install
    command = python.parent / "scalekd"
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}

    def run(*words):
        return subprocess.run([command, *words], cwd=tmp_path, env=env, capture_output=True, text=True)

    listed = run("recipes")
    assert listed.returncode == 0 and "fashion-scalekd" in listed.stdout, listed.stderr
    dumped = run("train", "--recipe", "fashion-ce", "--run.ds_config", "zero2", "--dump-config", "mine.json")
    assert dumped.returncode == 0, dumped.stderr
    assert json.loads((tmp_path / "mine.json").read_text())["run"]["ds_config"] == "zero2"
    mistyped = run("evalute")
    assert mistyped.returncode == 2 and "Did you mean 'evaluate'" in mistyped.stderr


def test_nothing_else_is_installed(install):
    kind, _, site, _ = install
    names = {path.name for path in site.iterdir()}
    assert not {"kernels", "ds_configs", "tests", "launch", "benchmarks"} & names
    (info,) = site.glob("scalekd_ds-*.dist-info")
    distribution = Distribution.at(info)
    assert distribution.read_text("top_level.txt").split() == ["scalekd_ds"]
    assert any(file.name == "LICENSE" for file in distribution.files)
    if kind == "plain":
        installed = {str(file) for file in distribution.files}
        sources = {str(f.relative_to(ROOT)) for f in (ROOT / "kernels").rglob("*.py")}
        assert sources and {f"scalekd_ds/{source}" for source in sources} <= installed
