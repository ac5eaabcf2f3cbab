"""Odd things that may lie where a verb looks for a file or a folder, each made from the right thing, and odd paths."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from tiny_run import RESNET


def truncated(right: Path, there: Path, share: float) -> None:
    """The right thing with its largest files cut off."""
    if right.is_dir():
        shutil.copytree(right, there)
        for path in there.rglob("*"):
            if path.is_file():
                os.truncate(path, int(path.stat().st_size * share))
        return
    there.write_bytes(right.read_bytes()[: int(right.stat().st_size * share)])


def without(right: Path, there: Path, pattern: str) -> None:
    """The right thing without the files of a pattern."""
    if not right.is_dir():
        pytest.skip("only a folder has files in it")
    shutil.copytree(right, there)
    for path in there.rglob(pattern):
        path.unlink() if path.is_file() else shutil.rmtree(path)


def replaced(right: Path, there: Path, pattern: str, text: str) -> None:
    """The right thing with other text in the files of a pattern, or in itself."""
    if right.is_dir():
        shutil.copytree(right, there)
        for path in there.rglob(pattern):
            path.write_text(text)
        return
    there.write_text(text)


def with_its_card(right: Path, there: Path, text: str) -> None:
    """A file of weights with another card."""
    if right.suffix != ".safetensors":
        pytest.skip("only a consolidated file has a card")
    shutil.copy(right, there)
    there.with_suffix(".json").write_text(text)


def circle(right: Path, there: Path) -> None:
    there.symlink_to(there.name + "2")
    there.with_name(there.name + "2").symlink_to(there.name)


def copied(right: Path, there: Path) -> None:
    shutil.copytree(right, there) if right.is_dir() else shutil.copy(right, there)
    if right.suffix == ".safetensors":
        shutil.copy(right.with_suffix(".json"), there.with_suffix(".json"))


CARD = {"version": 1, "architecture": "resnet18", "model_kwargs": RESNET, "num_classes": 3, "classes": ["a", "b", "c"]}
CARD |= {"image_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3, "step": 5, "top1": None, "interpolation": "bilinear"}
# situation -> what makes it, from the right thing and the path where it shall be
SITUATIONS = {
    "nothing": lambda right, there: None,
    "an empty folder": lambda right, there: there.mkdir(),
    "an empty file": lambda right, there: there.touch(),
    "text": lambda right, there: there.write_text("neither fish nor fowl\n" * 50),
    "bytes": lambda right, there: there.write_bytes(bytes(range(256)) * 40),
    "an empty object": lambda right, there: replaced(right, there, "*.json", "{}"),
    "a list": lambda right, there: replaced(right, there, "*.json", "[1, 2]"),
    "deep JSON": lambda right, there: replaced(right, there, "*.json", "[" * 100_000),
    "a number": lambda right, there: replaced(right, there, "*.json", "1e999"),
    "Latin-1": lambda right, there: there.write_bytes('{"caf\u00e9": 1}'.encode("latin-1")),
    "NUL bytes": lambda right, there: there.write_bytes(bytes(3000)),
    "cut in half": lambda right, there: truncated(right, there, 0.5),
    "its first bytes": lambda right, there: truncated(right, there, 0.02),
    "a link to nowhere": lambda right, there: there.symlink_to("nowhere"),
    "a circle of links": circle,
    "a link to it": lambda right, there: there.symlink_to(right),
    "a pipe": lambda right, there: os.mkfifo(there),
    "/dev/null": lambda right, there: there.symlink_to("/dev/null"),
    "/dev/zero": lambda right, there: there.symlink_to("/dev/zero"),
    "/proc/self/mem": lambda right, there: there.symlink_to("/proc/self/mem"),
    "without config.json": lambda right, there: without(right, there, "config.json"),
    "without JSON": lambda right, there: without(right, there, "*.json"),
    "without checkpoints": lambda right, there: without(right, there, "checkpoints"),
    "without weights": lambda right, there: without(right, there, "*.safetensors"),
    "without images of a class": lambda right, there: without(right, there, "class_0"),
    "an older card": lambda right, there: with_its_card(right, there, json.dumps({"architecture": "resnet18"})),
    "a newer card": lambda right, there: with_its_card(right, there, json.dumps(CARD | {"version": 99, "future": [1]})),
    "a card of wrong types": lambda right, there: with_its_card(
        right, there, json.dumps(CARD | {"num_classes": "three", "mean": 0.5, "image_size": "large", "classes": 3})
    ),
    "a card of odd values": lambda right, there: with_its_card(
        right,
        there,
        json.dumps(CARD | {"num_classes": -3, "std": [0, 0, 0], "image_size": 0, "interpolation": "magic"}),
    ),
    "a card of an unknown model": lambda right, there: with_its_card(
        right, there, json.dumps(CARD | {"architecture": "gone"})
    ),
    "a card of other arguments": lambda right, there: with_its_card(
        right, there, json.dumps(CARD | {"model_kwargs": {"layers": "x", "nonsense": 1}})
    ),
    "a card that is none": lambda right, there: with_its_card(right, there, "no card"),
}
# names of paths at which the right thing lies
NAMES = {
    "a name that is not UTF-8": b"caf\xe9",
    "a name with a line break": b"two\nlines",
    "a name with blanks": b" a  b ",
    "a name with braces": b"{a}[b]*?%s{0..1}",
    "a name with a colour": b"\x1b[31mred",
    "a long name": b"n" * 240,
}
# paths that are no files of ours, and cannot be made
PATHS = {
    "no name": "",
    "a dot": ".",
    "the root": "/",
    "a name that is too long": "n" * 300,
    "a path that is too long": "d/" * 3000 + "x",
    "below a file": "{hosts}/below",
    "a home": "~/nowhere",
    "a folder of the kernel": "/proc/nowhere/x",
    "an address": "https://example.com/x",
    "a flag": "--nowhere",
}
OUT_SITUATIONS = {
    "a folder": lambda there: there.mkdir(),
    "a folder with a file": lambda there: (there.mkdir(), (there / "mine.txt").write_text("kept")),
    "a file": lambda there: there.write_text("kept"),
    "a link to nowhere": lambda there: there.symlink_to("nowhere"),
    "a link to a folder": lambda there: there.symlink_to("/usr"),
    "a circle of links": lambda there: circle(there, there),
    "a pipe": os.mkfifo,
    "/dev/full": lambda there: there.symlink_to("/dev/full"),
}
