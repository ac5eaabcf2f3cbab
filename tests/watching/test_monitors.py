"""Monitors that cannot start end a run before it begins, with one line; those that fail later end with one warning.

Weights & Biases and TensorBoard are the real ones, on a machine without a login, without a network and with a full disk.
A small package stands in for Comet, which is not installed here, and for installations that are broken, which no real
package is on demand; they raise what the real ones raise (comet_ml 3.47: ValueError without a key).
"""

import json
from importlib.util import find_spec

import pytest
from forking import forked_ranks, forked_with
from image_fixtures import make_dataset
from tiny_run import supervised_arguments

WORKER = "tests/workers/monitor_worker.py"
needs_wandb = pytest.mark.skipif(find_spec("wandb") is None, reason="needs wandb, which is not installed")
NO_KEY = "Comet.ml requires an API key. Please provide as the first argument to Experiment(api_key)"
COMET = "__version__ = '3.47.0'\n"
# DeepSpeed's monitor calls the experiment by this name
EXPERIMENT = (
    COMET
    + """
import os, pathlib
class Experiment:
    def __init__(self):
        self.logged = 0
    def set_name(self, name):
        pass
    def __internal_api__log_metric__(self, name, value, step):
        self.logged += 1
        if self.logged > FAILS_AFTER:
            raise ConnectionError("the server hung up\\nand that is all")
        with open("comet.txt", "a") as file:
            file.write(f"{name} {step}\\n")
def start(**kwargs):
    return Experiment()
"""
)


def package(folder, name, content):
    """A stand-in for a package; None is a folder without a file, as services leave theirs in a working folder."""
    place = folder / "packages" / name
    place.mkdir(parents=True)
    if content is not None:
        (place / "__init__.py").write_text(content)
    return str(place.parent)


def begin(folder, monitors, *arguments, env=None):
    run_dir = folder / "run"
    run_dir.mkdir(exist_ok=True)
    # no settings and no login of whoever runs the tests
    clean = {"HOME": str(folder), "NETRC": str(folder / "netrc"), "WANDB_SILENT": "true", "WANDB_API_KEY": ""}
    return forked_with([clean | (env or {})], WORKER, monitors, run_dir, *arguments)


def refusal(done):
    """The one line of a run that did not start."""
    assert done.returncode == 2 and "Traceback" not in done.stderr + done.stdout, done.stdout + done.stderr
    assert "TRAINED" not in done.stdout
    lines = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def warning(done, monitor):
    """The one warning of a run that went on without a monitor."""
    assert done.returncode == 0 and "TRAINED" in done.stdout, done.stdout + done.stderr
    assert "Traceback" not in done.stderr + done.stdout, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("warning: the monitor")]
    assert len(lines) == 1 and lines[0].startswith(f"warning: the monitor {monitor} failed"), done.stderr
    assert lines[0].endswith("training goes on.")
    return lines[0]


@needs_wandb
@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({}, "No API key configured"),
        ({"WANDB_API_KEY": "short"}, "API key"),
        # nobody listens there
        ({"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "3"}, "CommError"),
        ({"WANDB_MODE": "nonsense"}, "ValidationError"),
    ],
    ids=["never logged in", "a key cut short", "no network", "an unknown mode"],
)
def test_weights_and_biases_that_cannot_start_ends_the_run_before_it_begins(tmp_path, env, words):
    line = refusal(begin(tmp_path, "wandb,csv", env=env))
    assert "the monitor wandb cannot start" in line and words in line and "`wandb login`" in line, line


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "wandb",
            "raise ImportError('libcuda.so: cannot open shared object file')",
            "wandb cannot start (ImportError: libcuda",
        ),
        ("wandb", "def init(:", "wandb cannot start (SyntaxError"),
        ("wandb", "x = 1", "wandb cannot start (AttributeError"),
        ("wandb", "def init(**_):\n    raise OSError(28, 'No space left on device')", "(OSError: [Errno 28]"),
        ("wandb", "def init(**_):\n    raise Exception", "(Exception: Exception): log in"),
        (
            "comet_ml",
            COMET + f"def start(**_):\n    raise ValueError({NO_KEY!r})",
            "(ValueError: Comet.ml requires an API key.",
        ),
        (
            "comet_ml",
            COMET + "def start(**_):\n    raise ConnectionError('no network')",
            "comet cannot start (ConnectionError",
        ),
        ("comet_ml", "__version__ = '3.1.0'", "(ImportError: `comet_ml` must have at least version 3.41.0)"),
        ("comet_ml", None, "comet needs its package, which is not installed: pip install comet_ml"),
        ("tensorboard", "raise ImportError('no protobuf')", "tensorboard cannot start (ImportError: no protobuf)"),
    ],
)
def test_a_package_that_is_broken_or_missing_ends_the_run_before_it_begins(tmp_path, name, content, words):
    monitor = {"comet_ml": "comet"}.get(name, name)
    line = refusal(begin(tmp_path, f"{monitor},csv", "--packages", package(tmp_path, name, content)))
    assert words in line, line


@pytest.mark.parametrize("monitor", ["tensorboard", "csv"])
def test_a_folder_that_cannot_be_written_ends_the_run_before_it_begins(tmp_path, monitor):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / monitor).write_text("")
    line = refusal(begin(tmp_path, monitor))
    assert f"the monitor {monitor}" in line and "File exists" in line and "--run.monitors" in line


@pytest.mark.parametrize("breakage", ["full", "gone"])
@pytest.mark.parametrize("monitor", ["tensorboard", "csv"])
def test_a_folder_that_is_full_or_gone_costs_that_monitor_alone(tmp_path, monitor, breakage):
    other = {"tensorboard": "csv", "csv": "tensorboard"}[monitor]
    done = begin(tmp_path, "tensorboard,csv", "--breakage", breakage, "--broken", monitor)
    assert {"full": "No space left", "gone": "No such file"}[breakage] in warning(
        done, monitor.replace("csv", "csv_monitor")
    )
    if other == "csv":
        assert (tmp_path / "run" / "csv" / "loss_total.csv").read_text().split() == [
            "step,total",
            "1,1.0",
            "2,0.5",
            "3,0.3333333333333333",
        ]
    else:
        (events,) = (tmp_path / "run" / "tensorboard").iterdir()
        assert events.read_bytes().count(b"loss/total") >= 3


@needs_wandb
def test_weights_and_biases_whose_service_dies_costs_that_monitor_alone(tmp_path):
    done = begin(tmp_path, "wandb,csv", "--breakage", "service", "--broken", "wandb", env={"WANDB_MODE": "offline"})
    assert done.returncode == 0 and "TRAINED" in done.stdout, done.stdout + done.stderr
    assert "3," in (tmp_path / "run" / "csv" / "loss_total.csv").read_text()


@pytest.mark.parametrize(("fails_after", "kept"), [(0, 0), (3, 3)])
def test_a_service_that_hangs_up_costs_that_monitor_alone(tmp_path, fails_after, kept):
    packages = package(tmp_path, "comet_ml", EXPERIMENT.replace("FAILS_AFTER", str(fails_after)))
    assert "ConnectionError: the server hung up)" in warning(
        begin(tmp_path, "comet,csv", "--packages", packages), "comet"
    )
    logged = tmp_path / "run" / "comet.txt"
    assert len(logged.read_text().split("\n")) - 1 == kept if kept else not logged.exists()
    assert "3," in (tmp_path / "run" / "csv" / "loss_total.csv").read_text()


def test_comet_gets_every_logged_step(tmp_path):
    packages = package(tmp_path, "comet_ml", EXPERIMENT.replace("FAILS_AFTER", "99"))
    done = begin(tmp_path, "comet", "--packages", packages)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "run" / "comet.txt").read_text().splitlines()
    assert lines == [f"{name} {step}" for step in (1, 2, 3) for name in ("loss/total", "optim/lr")]


def test_both_ranks_of_a_run_end_with_the_same_line(tmp_path):
    data = make_dataset(tmp_path / "data", train=8, val=4, classes=2, size=(32, 32))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").write_text("")
    runs = tmp_path / "runs.json"
    runs.write_text(json.dumps([[str(a) for a in supervised_arguments(data, tmp_path / "run")]]))
    done = forked_ranks("tests/workers/train_many.py", runs)
    ends = [line for line in done.stderr.splitlines() if line.startswith("scalekd_ds.errors.UserError")]
    assert len(ends) == 2 and len(set(ends)) == 1 and "the monitor tensorboard cannot start" in ends[0], done.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()
