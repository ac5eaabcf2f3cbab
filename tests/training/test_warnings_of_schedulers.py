"""The signals that schedulers send before the time is up: a run saves and ends well, whichever theirs is."""

import signal

import pytest
import tiny_run
from forking import forked
from launching import WORKERS

from scalekd_ds.checkpoint.load import choose_checkpoint

NAMES = ["SIGUSR2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("SIGALRM", "SIGXCPU"))]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_run.images(tmp_path_factory.mktemp("images"))


def run(data, run_dir, moment, name):
    done = forked(WORKERS / "signalled_train.py", moment, name, *tiny_run.arguments(data, run_dir))
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("moment", "step"), [("step@3", 3), pytest.param("evaluating", 10, marks=pytest.mark.slow)])
def test_a_run_saves(data, tmp_path, moment, step, name):
    done = run(data, tmp_path / "run", moment, name)
    assert done.returncode == 0, done.stderr
    assert f"stopped at step {step} of 10 ({name}); the same command with --run.resume auto" in done.stdout
    assert choose_checkpoint(tmp_path / "run", "auto").name == f"step{step:08d}"


@pytest.mark.parametrize("name", NAMES)
def test_a_start_ends_with_a_line(data, tmp_path, name):
    done = run(data, tmp_path / "run", "indexing", name)
    assert done.returncode == 128 + signal.Signals[name]
    assert f"stopped by {name}: no step was done, and nothing is lost" in done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_is_done_does_not_care(data, tmp_path, name):
    done = run(data, tmp_path / "run", "exit", name)
    assert done.returncode == 0 and (tmp_path / "run" / "results.json").is_file()
