"""Who looks for DeepSpeed's zero_to_fp32.py in a checkpoint finds one, which names the command that works."""

import json
import shlex
import shutil
import subprocess
import sys

import pytest
from forking import forked
from image_fixtures import make_dataset
from safetensors.torch import load_file
from tiny_run import supervised_arguments

from scalekd_ds.checkpoint import consolidate
from scalekd_ds.checkpoint.layout import checkpoints_of
from scalekd_ds.checkpoint.manifest import verify
from scalekd_ds.commands.consolidate import main


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of one step with a space and a quote in its name."""
    folder = tmp_path_factory.mktemp("it's mine")
    data = make_dataset(folder / "data", train=8, val=4, classes=2, size=(32, 32))
    runs = folder / "runs.json"
    runs.write_text(json.dumps([[str(a) for a in supervised_arguments(data, folder / "run", "--schedule.epochs", 1)]]))
    done = forked("tests/workers/train_many.py", runs)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "run"


def command_of(checkpoint):
    """What the script says, as the words of a command."""
    arguments = [".", "out", "--safe_serialization"]
    done = subprocess.run(
        # as DeepSpeed's documents have it, and without what the tests' interpreter has installed
        [sys.executable, "-I", "-S", "zero_to_fp32.py", *arguments],
        cwd=checkpoint,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr
    return shlex.split(done.stderr.splitlines()[-1])


def test_the_command_that_it_names_gives_the_student(trained, tmp_path, monkeypatch):
    (checkpoint,) = checkpoints_of(trained)
    program, verb, *arguments = command_of(checkpoint)
    assert (program, verb) == ("scalekd", "consolidate")
    monkeypatch.chdir(tmp_path)
    main(arguments)
    found = load_file(tmp_path / "student.safetensors")
    assert found.keys() == consolidate(checkpoint).keys() and all(
        v.dtype.is_floating_point or v.dim() == 0 for v in found.values()
    )


def test_it_can_be_started_by_its_name(trained):
    """As DeepSpeed's, which is a program."""
    done = subprocess.run(
        ["./zero_to_fp32.py", ".", "out"], cwd=checkpoints_of(trained)[0], capture_output=True, text=True
    )
    assert done.returncode == 1 and "scalekd consolidate" in done.stderr and "Traceback" not in done.stderr


def test_it_names_the_folder_to_which_a_checkpoint_was_moved(trained, tmp_path):
    moved = tmp_path / "elsewhere; true"
    shutil.copytree(checkpoints_of(trained)[0], moved)
    assert command_of(moved)[2] == str(moved)
    verify(moved)


def test_a_checkpoint_without_it_is_as_good(trained, tmp_path):
    """As those of older releases are."""
    old = tmp_path / "old"
    shutil.copytree(checkpoints_of(trained)[0], old)
    (old / "zero_to_fp32.py").unlink()
    verify(old)
    assert "zero_to_fp32.py" not in json.loads((old / "manifest.json").read_text())["files"]
    assert consolidate(old)
