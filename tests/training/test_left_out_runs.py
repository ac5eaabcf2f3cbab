"""Runs whose validation images cannot be used: they go on without a few, and never lose what was trained."""

import json
import shutil

import pytest
from forking import forked, forked_ranks
from launching import ROOT, errors_of
from safetensors.torch import load_file
from tiny_run import RESNET, images, scalars, supervised_arguments

from scalekd_ds.checkpoint.layout import checkpoints_of
from scalekd_ds.checkpoint.load import choose_checkpoint
from scalekd_ds.checkpoint.plain_weights import consolidate
from scalekd_ds.commands.evaluate import main as evaluate
from scalekd_ds.commands.inspect import main as inspect
from scalekd_ds.errors import UserError
from scalekd_ds.models.card import read_card

TRAIN = ROOT / "launch" / "train.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """11 validation images, of which the second of each class cannot be used; on two ranks, all of these are rank 1's."""
    return images(tmp_path_factory.mktemp("data"))


def damaged(data, folder, count):
    """A copy whose first `count` validation images of odd places are damaged."""
    shutil.copytree(data, folder)
    names = sorted((folder / "val").rglob("*.jpg"))
    for place in range(count):
        names[(2 * place + 1) % 11].write_bytes(b"" if place % 2 else b"text")
    return folder


def arguments(data, run_dir, *more):
    slim = ("--micro_batch_size", 4, "--run.log_every", 1, "--student_kwargs", json.dumps(RESNET))
    return supervised_arguments(data, run_dir, *slim, "--data.eval_batch_size", 2, *more)


def warnings_of(done) -> list[str]:
    return [line for line in done.stderr.splitlines() if "validation images cannot be used" in line]


@pytest.mark.parametrize(
    ("ranks", "config"), [(1, "zero1"), (2, "zero1"), pytest.param(2, "zero3", marks=pytest.mark.slow)]
)
def test_a_run_goes_on_without_a_few_validation_images_and_counts_them(data, tmp_path, ranks, config):
    """Five of eleven: on two ranks all that rank 1 has."""
    here, run_dir = damaged(data, tmp_path / "data", 5), tmp_path / "run"
    more = ("--data.max_bad_share", 0.5, "--run.ds_config", config, "--ema.decay", 0.9, "--schedule.epochs", 2)
    more += ("--run.eval_every", 1)
    done = forked_ranks(TRAIN, *arguments(here, run_dir, *more), ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    # once, and not at each of the two evaluations of two sets of weights
    (line,) = warnings_of(done)
    assert line.startswith("warning: 5 of 11 validation images cannot be used, and are left out of top-1 and top-5: ")
    results = json.loads((run_dir / "results.json").read_text())
    assert results["val_images"] == 6 and results["val_images_left_out"] == 5
    logged = scalars(run_dir)
    assert logged["data/bad_val_files"] == {5: 5.0, 10: 5.0}
    # shares of six images
    for name in ("val/top1", "val/ema_top1"):
        assert all(abs(value * 6 / 100 - round(value * 6 / 100)) < 1e-4 for value in logged[name].values())
    # the accuracy has reached the checkpoint, which was saved before it was known
    newest = choose_checkpoint(run_dir, "auto")
    for file in (newest / "student_ema.safetensors", run_dir / "student.safetensors"):
        assert read_card(file)["top1"] == pytest.approx(results["ema_top1"])


@pytest.mark.parametrize(("ranks", "count"), [(2, 6), (1, 2), pytest.param(2, 11, marks=pytest.mark.slow)])
def test_too_many_end_a_run_that_keeps_what_it_has_trained(data, tmp_path, ranks, count, capsys):
    here, run_dir = damaged(data, tmp_path / "data", count), tmp_path / "run"
    args = arguments(
        here, run_dir, "--run.eval_every", 0, "--run.save_every", 0, "--run.resume", "auto", "--schedule.epochs", 1
    )
    done = forked_ranks(TRAIN, *args, ranks=ranks)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-3000:]
    said = "none of the 11 validation images can be used" if count == 11 else f"{count} of 11 validation images cannot"
    for line in errors_of(done):
        assert said in line and f"What was trained is in {run_dir}/checkpoints/step00000005" in line
    assert 1 <= len(errors_of(done)) <= ranks
    newest = choose_checkpoint(run_dir, "auto")
    assert newest.name == "step00000005"
    weights, shipped = consolidate(newest), load_file(run_dir / "student.safetensors")
    assert all((weights[name] == shipped[name]).all() for name in weights)
    assert json.loads((run_dir / "student.json").read_text())["top1"] is None
    # mended, the same command ends the run
    shutil.rmtree(here / "val")
    shutil.copytree(data / "val", here / "val")
    on = forked_ranks(TRAIN, *args, ranks=ranks)
    assert on.returncode == 0 and "nothing is left to train after step 5" in on.stdout, on.stderr[-3000:]
    results = json.loads((run_dir / "results.json").read_text())
    assert results["step"] == 5 and results["val_images"] == 11
    assert read_card(run_dir / "student.safetensors")["top1"] == pytest.approx(results["top1"])
    evaluate([str(run_dir / "student.safetensors"), "--data", str(here), "--threads", "1"])
    assert f"top-1 {results['top1']:.2f}%" in capsys.readouterr().out


def test_an_evaluation_that_fails_between_two_saves_is_not_paid_with_steps(data, tmp_path):
    """Its images are bad from the second epoch on; the next checkpoint was due 95 steps later."""
    run_dir = tmp_path / "run"
    args = arguments(damaged(data, tmp_path / "data", 1), run_dir, "--run.save_every", 100, "--run.eval_every", 0.6)
    done = forked(TRAIN, *args, "--schedule.epochs", 40, "--data.max_bad_share", 0)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert [p.name for p in checkpoints_of(run_dir)] == ["step00000003"]
    on = forked(
        TRAIN,
        *args,
        "--run.resume",
        "auto",
        "--data.max_bad_share",
        0.1,
        "--run.stop_after",
        6,
        "--schedule.epochs",
        40,
    )
    assert on.returncode == 0, on.stderr[-3000:]
    # what the first start could not measure is measured
    assert sorted(scalars(run_dir)["val/top1"]) == [3, 6]


def test_evaluate_and_inspect_say_what_they_leave_out(data, tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert forked(TRAIN, *arguments(data, run_dir)).returncode == 0
    here, model = damaged(data, tmp_path / "data", 2), str(run_dir / "student.safetensors")
    evaluate([model, "--data", str(here), "--max-bad-share", "0.2", "--threads", "1"])
    told = capsys.readouterr()
    assert "(9 images, 2 left out)" in told.out and "2 of 11 validation images cannot be used" in told.err
    with pytest.raises(
        UserError, match=r"2 of 11 validation images cannot be used, more than --max-bad-share 0.001 allows"
    ):
        evaluate([model, "--data", str(here), "--threads", "1"])
    inspect([model, str(here), "--out", str(tmp_path / "sheet.png"), "--images", "11"])
    told = capsys.readouterr().out
    assert told.count("skipped ") == 2 and "9 of 11 images" in told and (tmp_path / "sheet.png").is_file()
