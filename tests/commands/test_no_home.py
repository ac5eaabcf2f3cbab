"""Users without a home, a cache or a folder for temporary files, as in containers: every verb works, or says what it lacks."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from forking import forked
from launching import LIMIT, ROOT, environment
from tiny_run import RESNET, images, supervised_arguments

SLIM = (
    "--student_kwargs",
    json.dumps(RESNET),
    "--schedule.epochs",
    1,
    "--run.pictures",
    1,
    "--run.ds_config",
    "cpu_fp32",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    images(folder / "data")
    done = forked(ROOT / "launch" / "train.py", *supervised_arguments(folder / "data", folder / "run", *SLIM))
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def commands(world, new) -> dict[str, list]:
    student, data = world / "run" / "student.safetensors", world / "data"
    return {
        "train": ["train", *supervised_arguments(data, new / "run", *SLIM)],
        "evaluate": ["evaluate", student, "--data", data],
        "consolidate": ["consolidate", world / "run", new / "out.safetensors"],
        "export": ["export", "--format", "torchscript", student, new / "out"],
        "push": ["push", world / "run", "me/student", "--dry-run", "--out", new / "out"],
        "inspect": ["inspect", student, data, "--out", new / "out.png", "--images", 2],
        "plan": ["plan", "--gpus", 1, "--gpu-memory", 8, "--config", world / "run" / "config.json"],
        "recipes": ["recipes"],
        "prepare-data": ["prepare-data", "verify", data],
        "completion": ["completion", "bash"],
        "doctor": ["doctor", "--write-env", "NCCL_SOCKET_IFNAME=eth0"],
        "train --dump-config": ["train", "--dump-config", new / "config.json"],
    }


def surroundings(folder) -> dict[str, dict[str, str | None]]:
    """Environment variables by situation; None removes one."""
    (folder / "file").touch()
    (folder / "shut").mkdir(mode=0o500)
    return {
        "no home": {"HOME": None, "XDG_CACHE_HOME": None},
        "a home that is missing": {"HOME": str(folder / "nowhere"), "XDG_CACHE_HOME": None},
        "a home that is a file": {"HOME": str(folder / "file"), "XDG_CACHE_HOME": None},
        "an empty home": {"HOME": "", "XDG_CACHE_HOME": ""},
        "a home that takes nothing": {"HOME": "/proc", "XDG_CACHE_HOME": None},
        "a cache that is relative": {"XDG_CACHE_HOME": "cache"},
        "a cache that is a file": {"XDG_CACHE_HOME": str(folder / "file")},
        "no folder for temporary files": {"TMPDIR": str(folder / "nowhere")},
        "a folder for temporary files that takes nothing": {"TMPDIR": "/proc"},
    }


VERBS = (
    "train",
    "evaluate",
    "consolidate",
    "export",
    "push",
    "inspect",
    "plan",
    "recipes",
    "prepare-data",
    "completion",
    "doctor",
)
NAMES = (
    *("no home", "a home that is missing", "a home that is a file", "an empty home", "a home that takes nothing"),
    *("a cache that is relative", "a cache that is a file", "no folder for temporary files"),
    "a folder for temporary files that takes nothing",
)
# the others take minutes
QUICK = {("train", "no home"), ("doctor", "no home"), ("completion", "a home that takes nothing")}


def cases():
    for verb in (*VERBS, "train --dump-config"):
        for name in NAMES:
            yield pytest.param(verb, name, marks=() if (verb, name) in QUICK else pytest.mark.slow, id=f"{verb}-{name}")


@pytest.mark.parametrize(("verb", "name"), cases())
def test_a_verb_needs_no_home(world, tmp_path, verb, name):
    here = tmp_path / "here"
    here.mkdir()
    env = environment(PYTHONPATH=str(ROOT), MPLCONFIGDIR="")
    env.pop("MPLCONFIGDIR")
    # compiled beforehand, as a first run does: it needs a cache of its own
    for variable, value in surroundings(tmp_path)[name].items():
        env.pop(variable, None)
        if value is not None:
            env[variable] = value
    command = [sys.executable, "-m", "scalekd_ds", *map(str, commands(world, here)[verb])]
    if name == "no home":
        # a user whom no list of users has
        command = ["unshare", "--user", "--map-user=12345", "--map-group=12345", *command]
        if subprocess.run(["unshare", "--user", "--map-user=12345", "true"], capture_output=True).returncode:
            pytest.skip("no user without a name can be had here: unshare --user is refused")
    done = subprocess.run(
        command, cwd=here, env=env, capture_output=True, text=True, timeout=LIMIT, stdin=subprocess.DEVNULL
    )
    assert "Traceback" not in done.stdout + done.stderr, done.stderr[-3000:]
    if done.returncode:
        assert done.returncode == 2, done.stderr[-2000:]
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
        assert any(word in line for word in ("cannot be written", "cache", "temporary", "home")), line
        assert "home" not in name or "takes nothing" in name, line
    shutil.rmtree(here)
    assert os.path.isdir(world / "run")
