"""The wheel as people install it: what it holds and says, and that it trains with what it declares and nothing else."""

import ast
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from importlib.metadata import distributions
from pathlib import Path

import pytest
import tiny_run
from declared import closure, constraints, declared, optional, read_constraints
from launching import LIMIT, ROOT, environment
from linked_environment import environment_with, providers
from packaging.utils import canonicalize_name
from test_packaging import copy_of_repo

from scalekd_ds import __version__

if "setuptools" not in {one.name for one in distributions()}:
    pytest.skip("needs setuptools to build with", allow_module_level=True)

# what `python -m build` calls, without an environment of its own to build in
BUILD = "import sys; from setuptools import build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"
# every module of the package, of which each may import what it needs at its top
IMPORT_ALL = """
import importlib, pkgutil, sys, scalekd_ds
names = [one.name for one in pkgutil.walk_packages(scalekd_ds.__path__, "scalekd_ds.") if "__main__" not in one.name]
for name in names:
    importlib.import_module(name)
print(len(names), scalekd_ds.__file__, *sorted({"pytest", "transformers", "onnx", "pandas", "wandb"} & set(sys.modules)))
"""


def build(what: str, source: Path, out: Path) -> Path:
    """An sdist or a wheel of a source tree."""
    out.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", BUILD, what, out], cwd=source, capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "absent from the `packages` configuration" not in done.stderr
    return out / done.stdout.split()[-1]


def contents(wheel: Path) -> dict[str, bytes]:
    """name -> bytes of the files of a wheel; its record repeats them."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/RECORD")}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(sdist, wheel) of a clone."""
    folder = tmp_path_factory.mktemp("built")
    repo = copy_of_repo(folder)
    return build("build_sdist", repo, folder / "dist"), build("build_wheel", repo, folder / "dist")


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The Python of an environment with the wheel and what it declares."""
    return environment_with(built[1], tmp_path_factory.mktemp("empty") / "venv")


def outside(python: Path, *words, cwd: Path):
    """Runs a command of an environment, outside of the repository and without its path."""
    env = {name: value for name, value in environment().items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    env["PATH"] = os.pathsep.join([str(python.parent), "/usr/bin", "/bin"])
    command = [str(python.parent / words[0]), *map(str, words[1:])]
    return subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=LIMIT, stdin=subprocess.DEVNULL
    )


# -- what is in it ---------------------------------------------------------------------------------------------------


def test_the_wheel_holds_the_package_and_its_data_and_no_tests(built):
    names = set(contents(built[1]))
    sources = {f"scalekd_ds/{f.relative_to(ROOT / 'scalekd_ds')}" for f in (ROOT / "scalekd_ds").rglob("*.py")}
    sources |= {f"scalekd_ds/{f.relative_to(ROOT)}" for f in (ROOT / "kernels").rglob("*.py")}
    data = {"scalekd_ds/py.typed", "scalekd_ds/recipes/sizes.json"}
    data |= {f"scalekd_ds/kernels/{name}/table.json" for name in ("cross_attention", "lamb", "window_attention")}
    data |= {f"scalekd_ds/ds_configs/{f.name}" for f in (ROOT / "ds_configs").glob("*.json")}
    assert sources | data == {name for name in names if ".dist-info/" not in name}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_source_distribution_builds_the_same_wheel(built, tmp_path):
    sdist, wheel = built
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    assert {"LICENSE", "README.md", "CITATION.cff", "PKG-INFO"} <= {path.name for path in source.iterdir()}
    assert contents(build("build_wheel", source, tmp_path / "again")) == contents(wheel)


def test_its_page_has_no_link_into_a_checkout(built):
    (text,) = [data.decode() for name, data in contents(built[1]).items() if name.endswith("/METADATA")]
    about = Parser().parsestr(text)
    assert about["License-Expression"] == "Apache-2.0" and about["Requires-Python"] == ">=3.11"
    assert {line.split(",")[0] for line in about.get_all("Project-URL")} >= {"Documentation", "Source", "Changelog"}
    minors = [line.rsplit(" ", 1)[1] for line in about.get_all("Classifier") if "Python :: 3." in line]
    assert {"3.11", "3.12"} <= set(minors)
    links = re.findall(r'\]\(([^)\s]+)|(?:src|srcset|href)="([^"]+)"', about.get_payload())
    assert links and all(link.startswith(("http", "#")) for pair in links for link in pair if link)
    pictures = [link for link, _ in links if link.endswith((".png", ".svg"))]
    assert all("/raw/" in link for link in pictures if "scalekd-ds/" in link)


def test_an_older_python_is_told(built, tmp_path):
    command = [sys.executable, "-m", "pip", "download", "--no-index", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", "3.10", "--dest", tmp_path, built[1]]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=LIMIT)
    assert done.returncode == 1
    assert "requires a different Python: 3.10.0 not in '>=3.11'" in done.stderr


def test_an_index_would_take_both(built):
    if "twine" not in {one.name for one in distributions()}:
        pytest.skip("needs twine, which the extra `dev` has")
    done = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *built], capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_version_is_in_one_place(built):
    assert [path.name for path in built] == [
        f"scalekd_ds-{__version__}.tar.gz",
        f"scalekd_ds-{__version__}-py3-none-any.whl",
    ]
    assert re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.M)[1] == __version__
    if not (ROOT / "CHANGELOG.md").is_file():
        pytest.skip("there is no CHANGELOG.md yet")
    released = re.findall(r"^## \[?v?(\d[^]\s]*)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert released[:1] == [__version__]


# -- what it needs ---------------------------------------------------------------------------------------------------


def test_what_the_code_imports_is_declared():
    """Also what a function imports: nothing may be there by the luck of another package's requirements."""
    known = {canonicalize_name(one.name) for one in declared()} | optional()
    owners = providers()
    undeclared = {}
    for path in [*(ROOT / "scalekd_ds").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in {name.split(".")[0] for name in names} - {"scalekd_ds", *sys.stdlib_module_names}:
                # mlxtend is in no environment of the tests where Fashion-MNIST is
                if not owners.get(name, {name}) & known:
                    undeclared.setdefault(name, set()).add(str(path.relative_to(ROOT)))
    assert undeclared == {}


def test_it_has_nothing_but_what_it_declares(installed, tmp_path):
    names = {canonicalize_name(name) for name in closure(declared())} | {"scalekd-ds"}
    code = (
        "import json; from importlib.metadata import distributions as d; print(json.dumps([one.name for one in d()]))"
    )
    done = outside(installed, "python", "-c", code, cwd=tmp_path)
    assert {canonicalize_name(name) for name in json.loads(done.stdout)} == names
    assert "pytest" not in names and "transformers" not in names


def test_every_module_is_imported_from_the_wheel(installed, tmp_path):
    done = outside(installed, "python", "-c", IMPORT_ALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    count, where, *others = done.stdout.split("\n")[-2].split()
    assert int(count) > 200 and Path(where).is_relative_to(installed.parents[1])
    assert others == []


def test_the_wheel_trains_outside_of_the_repository(installed, tmp_path):
    data = tiny_run.images(tmp_path / "images")
    words = tiny_run.arguments(data, tmp_path / "run", "--schedule.epochs", 1)
    done = outside(installed, "scalekd", "train", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert 0 <= results["top1"] <= 100
    assert (tmp_path / "run" / "student.safetensors").stat().st_size > 10_000
    version = outside(installed, "scalekd", "--version", cwd=tmp_path)
    assert version.stdout == f"scalekd_ds {__version__}\n"


# four such runs
@pytest.mark.slow
def test_the_quickstart_of_the_wheel_needs_no_repository(installed, tmp_path):
    """Teacher and students of a few steps on images of one's own; the second call repeats no run."""
    data = tiny_run.images(tmp_path / "images")
    small = ("--global_batch_size", 8, "--micro_batch_size", 8, "--schedule.epochs", 1, "--schedule.warmup_epochs", 0)
    words = ("scalekd", "quickstart", "--data", data, "--out", "out", "--train-args", *small)
    done = outside(installed, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert done.stdout.startswith("about 6 minutes on two CPU cores; here ")
    assert f"\nimages: your own images from {data}, made 32 pixels wide and high; 40 to train on\n" in done.stdout
    rows = (tmp_path / "out" / "table.txt").read_text()
    assert rows in done.stdout and [row.split("  ")[0] for row in rows.splitlines()[2:5]] == [
        "CE (no teacher)",
        "CE + logit KD",
        "ScaleKD",
    ]
    results = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/results.json")}
    assert {path.parent.name for path in results} == {"teacher", "ce-seed0", "kd-seed0", "scalekd-seed0"}
    again = outside(installed, *words, cwd=tmp_path)
    assert again.returncode == 0 and rows in again.stdout
    assert {path: path.stat().st_mtime_ns for path in results} == results


# -- the files of versions -------------------------------------------------------------------------------------------


def test_the_lowest_versions_are_those_that_setup_py_declares():
    assert (ROOT / "constraints-oldest.txt").read_text() == constraints("oldest")


def test_the_versions_that_the_tests_passed_with_are_allowed():
    """Each direct requirement is there, within its bounds; builds and what follows from torch are not."""
    fixed = read_constraints(ROOT / "constraints.txt")
    for one in declared():
        (version,) = [part.version for part in fixed[canonicalize_name(one.name)].specifier if part.operator == "=="]
        assert one.specifier.contains(version), (one, version)
    assert not [name for name, one in fixed.items() if name.startswith("nvidia-cu") or "+" in str(one.specifier)]
