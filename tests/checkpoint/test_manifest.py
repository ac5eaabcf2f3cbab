"""Manifests of checkpoints, whatever they hold: read, or refused in one line."""

import json
import random

import pytest

from scalekd_ds.checkpoint.manifest import MANIFEST, verify, write_manifest
from scalekd_ds.errors import UserError


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "step00000001"
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(bytes(range(256)))
    (folder / "b.json").write_text("{}")
    write_manifest(folder)
    verify(folder)
    return folder


def test_each_rank_verifies_its_share_of_the_files(checkpoint):
    (checkpoint / "b.json").write_text("[]")
    verify(checkpoint, rank=0, world_size=2)
    with pytest.raises(UserError, match=r"b.json is damaged: its SHA-256 differs"):
        verify(checkpoint, rank=1, world_size=2)
    (checkpoint / "b.json").write_text("longer")
    with pytest.raises(UserError, match=r"b\.json has 6 bytes, 2 were written"):
        verify(checkpoint, rank=0, world_size=2)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "a\0b"])
def test_nothing_outside_of_the_checkpoint_is_read(checkpoint, name):
    entry = {"bytes": 1, "sha256": "0"}
    (checkpoint / MANIFEST).write_text(json.dumps({"version": 1, "files": {name: entry}}))
    with pytest.raises(UserError, match="outside of the checkpoint"):
        verify(checkpoint)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "3",
        '{"files": 3}',
        '{"files": {"a": 3}}',
        '{"files": {"a": {"bytes": "x"}}}',
        "[" * 99999,
    ],
)
def test_a_manifest_of_other_content_is_refused_in_one_line(checkpoint, text):
    (checkpoint / MANIFEST).write_text(text)
    with pytest.raises(UserError, match="is damaged") as told:
        verify(checkpoint)
    assert "\n" not in str(told.value)


def test_nearly_all_of_two_thousand_damaged_manifests_are_refused(checkpoint):
    whole = (checkpoint / MANIFEST).read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(2000):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(damaged))
            kind = rng.randrange(3)
            if kind == 0:
                damaged[place] = rng.randrange(256)
            elif kind == 1:
                del damaged[place : place + rng.randint(1, 40)]
            else:
                damaged[place:place] = rng.randbytes(rng.randint(1, 8))
            if not damaged:
                break
        (checkpoint / MANIFEST).write_bytes(bytes(damaged))
        try:
            verify(checkpoint)
        except UserError:
            refused += 1
    # a changed blank, or the version's number, is all that may pass
    assert refused > 1500
