"""What the package declares that it needs, read from setup.py, and the files of versions that follow from it.

`python tests/helpers/declared.py oldest` prints constraints-oldest.txt, and `... newest` prints constraints.txt, of the
versions in the environment of this Python.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, distribution
from pathlib import Path
from runpy import run_path
from typing import Any
from unittest.mock import patch

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
# what torch pins of CUDA follows from its own version, and differs between its builds
FOLLOWS_TORCH = ("nvidia-", "cuda-")
HEADS = {
    "oldest": "# The lowest versions that setup.py allows, together: `make test-oldest`. Made by `make constraints`.",
    "newest": "# The tests have passed with these: pip install scalekd_ds -c constraints.txt. Made by `make constraints`.",
}


def setup_arguments() -> dict[str, Any]:
    """What setup.py tells setuptools."""
    with patch("setuptools.setup") as setup:
        run_path(str(ROOT / "setup.py"))
    return setup.call_args.kwargs


def declared() -> list[Requirement]:
    """The requirements of a plain install that apply to this machine."""
    found = map(Requirement, setup_arguments()["install_requires"])
    return [one for one in found if one.marker is None or one.marker.evaluate()]


def optional() -> set[str]:
    """Names of what a user may install beside them, which the extras of developers are not."""
    extras = {
        name: texts
        for name, texts in setup_arguments()["extras_require"].items()
        if name not in ("test", "dev", "docs")
    }
    return {canonicalize_name(Requirement(text).name) for texts in extras.values() for text in texts}


def lowest(requirement: Requirement) -> str:
    """The lowest version that a requirement allows; fails where it allows any."""
    (bound,) = [part.version for part in requirement.specifier if part.operator == ">="]
    return bound


def closure(requirements: Iterable[Requirement], leaves_out: Iterable[tuple[str, str]] = ()) -> dict[str, Distribution]:
    """The installed distributions that requirements need, directly or not: name -> distribution.

    Args:
        requirements: Those to begin with.
        leaves_out: Pairs (of, start): requirements of the distribution `of` whose names start so are not followed.
    """
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, str]] = set()
    left = [(one, extra) for one in requirements for extra in ("", *one.extras)]
    while left:
        requirement, extra = left.pop()
        name = canonicalize_name(requirement.name)
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        found[name] = distribution(name)
        for text in found[name].requires or []:
            one = Requirement(text)
            if any(name == of and one.name.startswith(start) for of, start in leaves_out):
                continue
            if one.marker is None or one.marker.evaluate({"extra": extra}):
                left += [(one, more) for more in ("", *one.extras)]
    return found


def constraints(kind: str) -> str:
    """The text of constraints-oldest.txt (`oldest`) or constraints.txt (`newest`)."""
    if kind == "oldest":
        lines = [f"{one.name}=={lowest(one)}" for one in declared()]
    else:
        found = closure(declared(), [("torch", start) for start in FOLLOWS_TORCH])
        # a local label, as in 2.14.1+cpu, names a build that no index has
        lines = [f"{name}=={one.version.split('+')[0]}" for name, one in found.items()]
    return "\n".join([HEADS[kind], *sorted(lines)]) + "\n"


def read_constraints(path: Path) -> dict[str, Requirement]:
    """name -> requirement, of the lines of a file of constraints."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(one.name): one for one in map(Requirement, lines)}


if __name__ == "__main__":
    print(constraints(sys.argv[1]), end="")
