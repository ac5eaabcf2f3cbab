"""An environment that holds the wheel and exactly what it declares, without fetching gigabytes: links to this one's."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterable
from importlib.metadata import Distribution, distributions
from pathlib import Path

from declared import closure, declared
from launching import LIMIT
from packaging.utils import canonicalize_name


def link_distributions(found: Iterable[Distribution], site: Path) -> None:
    """Links the files of distributions into the folder `site`, as few links as tell them from others' files.

    Several distributions share a folder such as nvidia/; only that is made anew, and what is in it linked.
    """
    wanted = {canonicalize_name(one.name) for one in found}
    # path of a file or folder below site-packages -> names of those that own files there
    owners: dict[tuple[str, ...], set[str]] = {}
    homes: dict[tuple[str, ...], Path] = {}
    for one in distributions():
        home = Path(str(one.locate_file("")))
        for file in one.files or []:
            if ".." in file.parts or file.suffix == ".pth":
                continue
            for depth in range(1, len(file.parts) + 1):
                owners.setdefault(file.parts[:depth], set()).add(canonicalize_name(one.name))
                homes[file.parts[:depth]] = home
    for parts, names in owners.items():
        whole = names <= wanted
        above_is_whole = len(parts) > 1 and owners[parts[:-1]] <= wanted
        source = homes[parts].joinpath(*parts)
        if whole and not above_is_whole and source.exists():
            target = site.joinpath(*parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(source)


def environment_with(wheel: Path, folder: Path) -> Path:
    """The Python of a new environment in `folder` with the wheel and its declared requirements, and nothing else."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    link_distributions(closure(declared()).values(), site)
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check"]
    command += ["--no-index", "--no-deps", wheel]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=LIMIT)
    assert done.returncode == 0, done.stdout + done.stderr
    return python
