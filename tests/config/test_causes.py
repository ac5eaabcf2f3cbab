"""Errors of others as one line: memory that runs out, and the cause below a library's heading."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from launching import ROOT, environment

from scalekd_ds.errors import UserError, cause_of, explained


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
