"""Errors of others as one line: memory that runs out, and the cause below a library's heading."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import ROOT, environment

from scalekd_ds.errors import UserError, cause_of, cure_of, explained
from scalekd_ds.files.durable import write_json
from scalekd_ds.training.run_dir import check_room


@pytest.mark.parametrize(
    "work",
    [
        lambda: torch.empty(2**62, dtype=torch.uint8),
        lambda: np.empty(2**62, dtype=np.uint8),
        lambda: bytearray(2**62),
        lambda: (_ for _ in ()).throw(
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        ).__next__(),
    ],
)
@pytest.mark.parametrize("rank", [{}, {"RANK": "1", "WORLD_SIZE": "2"}])
def test_memory_that_is_too_small_is_one_line(monkeypatch, work, rank):
    """Whoever asks for it: a tensor of our own, NumPy, a GPU; alone and in a job."""
    for name, value in rank.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"out of memory \(.*\): use smaller batches .--micro_batch_size.*scalekd plan"):
        explained(work)


def test_a_limit_of_addresses_is_the_reason_and_not_the_batch(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (4 * 2**30, resource.RLIM_INFINITY))
    with pytest.raises(UserError, match=r"out of memory \(.*\): `ulimit -v` allows 4.0 GiB of addresses, .*: raise it"):
        explained(lambda: bytearray(2**62))


def test_the_cure_is_that_of_the_systems_error():
    """Also where another library or another rank has made a text of it."""
    for number, words in {errno.EROFS: "only be read", errno.EFBIG: "ulimit -f", errno.EDQUOT: "quota"}.items():
        assert words in cure_of(f"I/O error: {os.strerror(number)} (os error {number})")
    assert cure_of("unforeseen") == "check the path and its disk"


def test_a_write_that_fails_names_its_file(tmp_path):
    (tmp_path / ".x.json.partial").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"No space left on device: .*x.json.partial: free space on the disk"):
        explained(lambda: write_json(tmp_path / "x.json", {}))


def test_a_disk_that_cannot_hold_a_checkpoint_is_refused(tmp_path):
    check_room(tmp_path, 1)
    # it does not know its size
    check_room(Path("/proc"), 2**70)
    with pytest.raises(UserError, match=r"MiB free, and a checkpoint of this run takes .* MiB with its student: free"):
        check_room(tmp_path, 2**70)


def test_the_cause_of_a_pipelines_error_is_what_follows_its_heading():
    error = RuntimeError("Critical error in pipeline:\nError in CPU operator `resize`,\nthe size is too large\nStack:")
    assert cause_of(error) == "the size is too large"
    assert cause_of(RuntimeError("only a heading:")) == "only a heading:"


def test_a_folder_that_was_deleted_meanwhile_is_said(tmp_path):
    gone = tmp_path / "gone"
    for script in (ROOT / "launch" / "train.py", ROOT / "launch" / "evaluate.py"):
        gone.mkdir()
        done = subprocess.run(
            ["sh", "-c", 'rmdir "$PWD"; exec "$@"', "sh", sys.executable, script, "--help"],
            cwd=gone,
            env=environment(PYTHONPATH=str(ROOT)),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2, done.stderr
        assert done.stderr.splitlines()[-1].startswith("error: the current folder cannot be used (No such file"), (
            done.stderr
        )
