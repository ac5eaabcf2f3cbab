"""The logs of a run that was started several times read as those of one run."""

import csv
import json
import os

import pytest
import tiny_run
from forking import forked
from launching import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scalekd_ds.watching import continued_logs

TRAIN = ROOT / "launch" / "train.py"


def steps_in_tensorboard(run_dir) -> dict[str, list[int]]:
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [e.step for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def rows(path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


# (where the first start ends, the checkpoint from which the second goes on)
@pytest.mark.parametrize(
    ("first", "resume"),
    [(8, "auto"), (8, "step00000006"), pytest.param(10, "step00000009", marks=pytest.mark.slow)],
)
def test_steps_that_are_trained_again_are_logged_once(tmp_path, first, resume):
    run_dir = tmp_path / "run"
    job = tiny_run.supervised_arguments(tiny_run.images(tmp_path / "data"), run_dir, "--schedule.epochs", 3)
    job += [
        "--student_kwargs.channels",
        "[8, 8, 8, 8]",
        "--run.log_every",
        1,
        "--run.eval_every",
        1,
        "--run.save_every",
        3,
    ]
    job += ["--run.monitors", "tensorboard,csv", "--run.pictures", 0]
    began = forked(TRAIN, *job, "--run.stop_after", first)
    assert began.returncode == 0, began.stderr[-2000:]
    where = resume if resume == "auto" else run_dir / "checkpoints" / resume
    on = forked(TRAIN, *job, "--run.resume", where)
    assert on.returncode == 0, on.stderr[-2000:]
    # a run that stops evaluates where it stops, which is before the checkpoint that `auto` takes
    evaluated = sorted({5, 10, 15} | ({first} if resume == "auto" else set()))
    found = steps_in_tensorboard(run_dir)
    assert found["loss/total"] == list(range(1, 16)) and found["val/top1"] == evaluated
    for tag, steps in found.items():
        assert steps == sorted(set(steps)), tag
        header, *values = rows(run_dir / "csv" / f"{tag.replace('/', '_')}.csv")
        assert header == ["step", tag.split("/")[-1]] and [int(step) for step, _ in values] == steps
    assert f"resuming {run_dir} from step" in on.stdout


def test_a_csv_file_of_earlier_releases_is_mended(tmp_path):
    """A header at each start, steps that were trained again, and a last row that a kill has cut."""

    class Csv:
        log_dir, filenames = str(tmp_path), []

    path = tmp_path / "loss_total.csv"
    path.write_text("step,total\n1,0.5\n2,0.4\nstep,total\n3,0.3\n4,0.2\n5,0.")
    (tmp_path / "empty.csv").touch()
    continued_logs.continue_csv(Csv, 3)
    assert path.read_text() == "step,total\n1,0.5\n2,0.4\n3,0.3\n" and Csv.filenames == ["loss_total"]


def test_wandb_goes_on_as_the_same_run(tmp_path, monkeypatch):
    ids = []
    for folder in ("a", "a", "b"):
        (tmp_path / folder).mkdir(exist_ok=True)
        # set and then deleted, so that the end of the test takes back what is set meanwhile
        for name in ("WANDB_RUN_ID", "WANDB_RESUME"):
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        continued_logs.continue_wandb(tmp_path / folder)
        ids.append(os.environ["WANDB_RUN_ID"])
        assert os.environ["WANDB_RESUME"] == "allow"
    assert ids[0] == ids[1] != ids[2]
    assert json.loads((tmp_path / "a" / "wandb_id.json").read_text())["id"] == ids[0]
    # one that the user has set stays
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    continued_logs.continue_wandb(tmp_path / "a")
    assert os.environ["WANDB_RUN_ID"] == "mine"
