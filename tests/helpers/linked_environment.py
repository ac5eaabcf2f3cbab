"""An environment that holds the wheel and exactly what it declares, without fetching gigabytes: links to this one's."""

from __future__ import annotations

import csv
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterable
from functools import cache
from importlib.metadata import distributions
from pathlib import Path

from declared import closure, declared
from launching import LIMIT
from packaging.utils import canonicalize_name


@cache
def owners() -> tuple[dict[tuple[str, ...], set[str]], dict[str, Path]]:
    """Who owns what is installed here.

    Returns:
        Path of a file or folder below site-packages, in parts -> names of the distributions that own files there; and name
        of a distribution -> its site-packages.
    """
    found: dict[tuple[str, ...], set[str]] = {}
    homes = {}
    for one in distributions():
        name = canonicalize_name(one.name)
        homes[name] = Path(str(one.locate_file("")))
        # not `one.files`, which makes an object of each of a hundred thousand files
        for row in csv.reader((one.read_text("RECORD") or "").splitlines()):
            parts = tuple(row[0].split("/"))
            if parts[0] != ".." and not parts[0].endswith(".pth"):
                for depth in range(1, len(parts) + 1):
                    found.setdefault(parts[:depth], set()).add(name)
    return found, homes


def providers() -> dict[str, set[str]]:
    """Name of a module at the top -> names of the distributions that have it."""
    found: dict[str, set[str]] = {}
    for parts, names in owners()[0].items():
        if len(parts) == 1:
            found.setdefault(parts[0].split(".")[0], set()).update(names)
    return found


def link_distributions(names: Iterable[str], site: Path) -> None:
    """Links the files of distributions into the folder `site`, as few links as tell them from others' files.

    Several distributions share a folder such as nvidia/; only that is made anew, and what is in it linked.
    """
    wanted = set(names)
    found, homes = owners()
    for parts, names_here in found.items():
        linked_above = len(parts) > 1 and found[parts[:-1]] <= wanted
        source = homes[next(iter(names_here))].joinpath(*parts)
        if names_here <= wanted and not linked_above and source.exists():
            target = site.joinpath(*parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(source)


def environment_with(wheel: Path, folder: Path) -> Path:
    """The Python of a new environment in `folder` with the wheel and its declared requirements, and nothing else."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    link_distributions(closure(declared()), site)
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check"]
    # a checkout on PYTHONPATH would pass for one that is installed
    command += ["--no-index", "--no-deps", "--ignore-installed", wheel]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=LIMIT)
    assert done.returncode == 0, done.stdout + done.stderr
    return python
