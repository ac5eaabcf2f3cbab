#!/usr/bin/env python3
"""Takes DeepSpeed and DALI to a machine without a network, in pieces: `python benchmarks/pack_wheels.py pack deepspeed dali`.

`pack` downloads wheels for Python 3.12 on Linux, and cuts large ones. Each folder call1, call2, ... of pieces fits one transfer
of 64 MiB beside a repository. On the other machine, `join FOLDER --into DIR` keeps the pieces of one transfer and, once all
are there, checks their SHA-256 and installs the wheels into DIR, for PYTHONPATH.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MIB = 1 << 20
# of one piece, and of all pieces of one transfer, in which the repository (10 MiB) travels too
PIECE, TRANSFER = 48 * MIB, 52 * MIB
MANIFEST = "manifest.json"
# what the image of such a machine (PyTorch, timm, torchvision, TensorBoard, pytest, psutil, einops, ninja) has not
PACKAGES = {
    "deepspeed": [
        *("deepspeed==0.19.8", "hjson", "msgpack", "py-cpuinfo", "pydantic", "pydantic-core", "annotated-types"),
        *("typing-extensions", "typing-inspection", "jsonargparse", "docstring-parser", "argcomplete"),
    ],
    "dali": [
        *("nvidia-dali-cuda130==2.4.0", "nvidia-nvimgcodec-cu13<0.10", "nvidia-libnvcomp-cu13==5.3.0.16", "astunparse"),
        *("gast<=0.7.0", "optree", "nvtx", "makefun", "libcst~=1.8", "nvidia-nvjpeg", "nvidia-nvjpeg2k-cu13"),
        "nvidia-nvtiff-cu13",
    ],
}
# pip matches a platform exactly
_PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (39, 35, 34, 31, 28, 27, 24, 17, 12, 5)]
_PLATFORMS += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"]


def _pip(*arguments: Any) -> None:
    """Runs pip quietly.

    Raises:
        ValueError: It failed; what it said last.
    """
    # DeepSpeed comes as source: none of its operators is compiled here
    env = {**os.environ, "DS_BUILD_OPS": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    command = [sys.executable, "-m", "pip", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or f"status {done.returncode}").splitlines()
        raise ValueError(f"pip {arguments[0]} failed: {said[-1]}")


def download(requirements: Sequence[str], folder: Path, extra: Sequence[str] = ()) -> list[Path]:
    """Wheels of the requirements alone, without what they need in turn; from source where a package has no wheel.

    Args:
        requirements: As pip takes them.
        folder: Where the wheels go.
        extra: Further arguments of pip, such as those that leave the index alone.

    Raises:
        ValueError: pip cannot find or build one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    platforms = [word for name in _PLATFORMS for word in ("--platform", name)]
    for requirement in requirements:
        before = {path.name for path in folder.glob("*.whl")}
        try:
            _pip(
                *("download", "-q", "--no-deps", "--only-binary=:all:", "--python-version", "3.12"),
                *("--implementation", "cp", *platforms, "-d", folder, *extra, requirement),
            )
        except ValueError:
            # pure Python, as DeepSpeed without its operators is: this Python's wheel is any Python 3's
            _pip("wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, *extra, requirement)
        for made in {path.name for path in folder.glob("*.whl")} - before:
            if not made.endswith(("-any.whl", "x86_64.whl")):
                raise ValueError(
                    f"{requirement}: {made} is no wheel for x86-64: add its package's name for that platform."
                )
    return sorted(folder.glob("*.whl"))


def cut(wheels: Sequence[Path], out: Path, piece: int = PIECE, transfer: int = TRANSFER) -> list[Path]:
    """Cuts wheels into pieces and spreads them over folders of at most `transfer` bytes.

    Args:
        wheels: Files.
        out: Empty or missing folder, which gets call1, call2, ..., each with the manifest of all pieces.
        piece: Most bytes of a piece.
        transfer: Most bytes of a folder.

    Raises:
        ValueError: `out` has something in it.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"out is {str(out)!r}: it must be an empty or a new folder.")
    pieces, listed = [], []
    for wheel in wheels:
        content = wheel.read_bytes()
        parts = [content[i : i + piece] for i in range(0, len(content), piece)]
        names = [wheel.name] if len(parts) == 1 else [f"{wheel.name}.piece{i + 1}" for i in range(len(parts))]
        sums = [hashlib.sha256(part).hexdigest() for part in parts]
        listed.append(
            {
                "wheel": wheel.name,
                "sha256": hashlib.sha256(content).hexdigest(),
                "pieces": [{"name": name, "sha256": total} for name, total in zip(names, sums, strict=True)],
            }
        )
        pieces += zip(names, parts, strict=True)
    calls: list[list[tuple[str, bytes]]] = []
    # the largest first, so that small ones fill what is left
    for name, part in sorted(pieces, key=lambda item: -len(item[1])):
        room = (call for call in calls if sum(len(held) for _, held in call) + len(part) <= transfer)
        call = next(room, None)
        if call is None:
            calls.append(call := [])
        call.append((name, part))
    folders = []
    for number, call in enumerate(calls, 1):
        folders.append(out / f"call{number}")
        folders[-1].mkdir(parents=True)
        for name, part in call:
            (folders[-1] / name).write_bytes(part)
        (folders[-1] / MANIFEST).write_text(json.dumps(listed, indent=1) + "\n")
    return folders


def join(folder: Path, keep: Path, into: Path) -> list[str]:
    """Keeps the pieces in `folder`; once all of the manifest are kept, installs their wheels.

    Args:
        folder: Of one transfer.
        keep: Where the pieces of all transfers are kept.
        into: Where the wheels are installed; a second call replaces them.

    Returns:
        Names of the pieces that are still missing.

    Raises:
        ValueError: There is no manifest, a piece is damaged, or pip refuses a wheel.
    """
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"FOLDER is {str(folder)!r}: it must be a folder of pieces from `pack`, with {MANIFEST}.")
    listed = json.loads((folder / MANIFEST).read_text())
    keep.mkdir(parents=True, exist_ok=True)
    sums = {piece["name"]: piece["sha256"] for wheel in listed for piece in wheel["pieces"]}
    for name, expected in sums.items():
        if (folder / name).is_file():
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != expected:
                raise ValueError(f"{folder / name} is damaged: its SHA-256 is not that of the manifest; copy it again.")
            shutil.copy(folder / name, keep / name)
    if missing := [name for name in sums if not (keep / name).is_file()]:
        return missing
    with tempfile.TemporaryDirectory() as made:
        wheels = []
        for wheel in listed:
            content = b"".join((keep / piece["name"]).read_bytes() for piece in wheel["pieces"])
            if hashlib.sha256(content).hexdigest() != wheel["sha256"]:
                raise ValueError(f"{wheel['wheel']} is damaged: delete {keep}, and copy its pieces again.")
            wheels.append(Path(made) / wheel["wheel"])
            wheels[-1].write_bytes(content)
        _pip("install", "-q", "--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", into, *wheels)
    return []


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    packing = verbs.add_parser("pack", help="on a machine with a network")
    packing.add_argument("names", nargs="+", metavar="NAME", help=f"{', '.join(PACKAGES)}, or a requirement of pip")
    packing.add_argument("--out", type=Path, default=Path(".wheels"), help="new folder of the pieces (.wheels)")
    packing.add_argument("--pip-args", default="", help="further arguments of pip, in one string")
    joining = verbs.add_parser("join", help="on the machine without one")
    joining.add_argument("folder", type=Path, metavar="FOLDER", help="pieces of this transfer")
    joining.add_argument("--into", type=Path, required=True, help="folder of the packages, for PYTHONPATH")
    joining.add_argument("--keep", type=Path, help="folder of all transfers' pieces, else INTO with -pieces at its end")
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    try:
        if args.verb == "pack":
            requirements = [each for name in args.names for each in PACKAGES.get(name, [name])]
            with tempfile.TemporaryDirectory() as made:
                wheels = download(requirements, Path(made), args.pip_args.split())
                for folder in cut(wheels, args.out):
                    size = sum(path.stat().st_size for path in folder.iterdir())
                    print(f"{folder}: {size / MIB:.1f} MiB, {', '.join(sorted(p.name for p in folder.iterdir()))}")
            return
        missing = join(args.folder, args.keep or args.into.with_name(f"{args.into.name}-pieces"), args.into)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"not yet there: {', '.join(missing)}" if missing else f"installed: set PYTHONPATH={args.into}")


if __name__ == "__main__":
    main()
