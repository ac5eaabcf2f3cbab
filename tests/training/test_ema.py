"""The student's moving average: on two real ranks at every ZeRO stage, through checkpoints, runs and exports."""

import json
import re

import pytest
import timm
import torch
from forking import forked, forked_ranks
from image_fixtures import make_dataset
from launching import ROOT, WORKERS, result_of
from safetensors.torch import load_file
from tiny_run import arguments, scalars

from scalekd_ds.checkpoint.layout import checkpoints_of
from scalekd_ds.checkpoint.plain_weights import consolidate
from scalekd_ds.errors import UserError
from scalekd_ds.training.ema import slow_average_notice

STAGES = ["zero0", "zero1", "zero2 round robin", "zero3 sub-groups"]
# ten seconds each, and the same lines
STAGES += [pytest.param(stage, marks=pytest.mark.slow) for stage in ("zero2", "zero3", "zero3 persistent")]


@pytest.fixture(scope="module")
def two_ranks(asked):
    return result_of(forked_ranks(WORKERS / "ema_worker.py", "zero0", *sorted(asked("stage") - {"zero0"})))


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_average_as_a_plain_loop_does(two_ranks, stage):
    """Against float64 averages of two replicas in one process, BatchNorm's statistics and tied weights included."""
    result = two_ranks[stage]
    assert result["error"] < 1e-6
    # the average is not simply the weights
    assert result["distance"] > 0.05
    assert result["names"]


@pytest.mark.parametrize("stage", STAGES)
def test_the_average_goes_on_from_a_checkpoint_bit_for_bit(two_ranks, stage):
    assert two_ranks[stage]["bits"]


@pytest.mark.parametrize("stage", STAGES)
def test_all_ranks_together_hold_one_copy_of_the_student(two_ranks, stage):
    """Trainable weights once, each rank's own BatchNorm statistics, no projector and no frozen weight."""
    fc1, norm, fc2, tied_bias, head, statistics = 13 * 37 + 37, 2 * 37, 37 * 37 + 37, 37, 37 * 11 + 11, 2 * 37
    assert two_ranks[stage]["held"] == fc1 + norm + fc2 + tied_bias + head + 2 * statistics


@pytest.mark.parametrize("stage", STAGES)
def test_only_the_rank_that_writes_whole_weights_copies_them(two_ranks, stage):
    """Another rank would pin as much host memory as the student takes, for nothing."""
    assert two_ranks[stage]["copied"] == 0


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Six steps in one go and cut in the middle; and one at ZeRO-3 under autocast that ships the weights themselves."""
    tmp = tmp_path_factory.mktemp("runs")
    data = make_dataset(tmp / "data", train=24, val=7, classes=3, size=(32, 32))
    average = ("--ema.decay", 0.8)
    zero2 = (*average, "--run.ds_config", "zero2", "--run.save_every", 3)
    jobs = [
        arguments(data, tmp / "whole", *zero2),
        arguments(data, tmp / "cut", *zero2, "--run.stop_after", 3),
        arguments(data, tmp / "cut", *zero2, "--run.resume", "auto"),
        arguments(data, tmp / "zero3", *average, "--run.ds_config", "zero3", "--ema.evaluate", "false"),
    ]
    jobs += [arguments(data, tmp / "plain", "--teacher", "none", "--run.stop_after", 1)]
    # evaluated and saved at the same steps, so that BatchNorm's statistics are synchronised at the same ones
    jobs[0] += ["--run.eval_every", 1]
    (tmp / "jobs.json").write_text(json.dumps([[str(a) for a in job] for job in jobs]))
    done = forked_ranks(WORKERS / "train_many.py", tmp / "jobs.json")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return tmp


def equal(a, b):
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_that_is_cut_and_resumed_has_the_same_average(runs):
    whole, cut = (load_file(runs / name / "student.safetensors") for name in ("whole", "cut"))
    assert equal(whole, cut)
    assert checkpoints_of(runs / "cut")[-1].name == "step00000006"


def test_the_run_ships_what_it_evaluates(runs):
    for name, shipped, other in (("whole", "ema", "student"), ("zero3", "student", "ema")):
        results = json.loads((runs / name / "results.json").read_text())
        card = json.loads((runs / name / "student.json").read_text())
        assert results["weights"] == card["weights"] == shipped
        assert results["top1"] == results[f"{shipped}_top1"] == card["top1"]
        final = load_file(runs / name / "student.safetensors")
        assert equal(final, consolidate(runs / name)) and equal(final, consolidate(runs / name, weights=shipped))
        assert not equal(final, consolidate(runs / name, weights=other))


def test_the_average_is_measured_beside_the_student(runs):
    for name in ("whole", "zero3"):
        logged, results = scalars(runs / name), json.loads((runs / name / "results.json").read_text())
        assert logged["val/top1"][6] == pytest.approx(results["student_top1"], rel=1e-5)
        assert logged["val/ema_top1"][6] == pytest.approx(results["ema_top1"], rel=1e-5)
        assert 6 in logged["val/ema_top5"]


def test_the_average_exports_by_name_and_loads_into_timm(runs, tmp_path):
    out = tmp_path / "average.safetensors"
    done = forked(ROOT / "launch" / "consolidate.py", runs / "zero3", out, "--weights", "ema")
    assert done.returncode == 0, done.stderr
    assert "(average, decay 0.8)" in done.stdout
    card = json.loads(out.with_suffix(".json").read_text())
    assert card["ema_decay"] == 0.8 and card["step"] == 6
    model = timm.create_model(card["architecture"], num_classes=card["num_classes"], **card["model_kwargs"])
    state = load_file(out)
    assert set(state) == set(model.state_dict())
    model.load_state_dict(state, strict=True)
    # 6 steps of 2 micro batches on each rank: integers are the live ones
    assert state["bn1.num_batches_tracked"] == 12
    done = forked(ROOT / "launch" / "evaluate.py", out, "--data", runs / "data", "--batch-size", 4)
    top1 = json.loads((runs / "zero3" / "results.json").read_text())["ema_top1"]
    assert f"top-1 {top1:.2f}%" in done.stdout, done.stdout + done.stderr


def test_a_checkpoint_and_a_run_must_agree_on_keeping_an_average(two_ranks):
    dropped, missing = two_ranks["zero0"]["errors"]
    assert "holds an average of the student, which ema.decay 0 would lose" in dropped
    assert "holds no average of the student, and ema.decay is 0.7" in missing


def test_a_decay_of_one_or_more_and_averages_that_are_not_there_are_refused(runs, tmp_path):
    done = forked(ROOT / "launch" / "train.py", "--recipe", "fashion-ce", "--ema.decay", 1.5)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == ["error: ema.decay is 1.5: it must be in [0, 1) (0 is off)."]
    with pytest.raises(UserError, match="weights is 'swa': it must be one of student, ema"):
        consolidate(runs / "whole", weights="swa")
    done = forked(ROOT / "launch" / "consolidate.py", runs / "plain", tmp_path / "x.safetensors", "--weights", "ema")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "holds no ema weights: its run kept no average" in done.stderr
    assert not list(tmp_path.iterdir())
    # a run without an average is as it was: one file, and no figure of an average
    assert not (checkpoints_of(runs / "plain")[-1] / "student_ema.safetensors").exists()
    results = json.loads((runs / "plain" / "results.json").read_text())
    assert results["weights"] == "student" and results["ema_top1"] is None


@pytest.mark.parametrize(
    ("decay", "steps", "words"),
    [
        (0.9999, 500, "95% of the average will still be the first step's weights. --ema.decay 0.98 spans"),
        (0.999, 1000, "37% of the average"),
        (0.9, 4, "73% of the average will still be the first step's weights. --ema.decay 0.368403 leaves them"),
        (0.9999, 375_000, None),
        (0.99, 1000, None),
        (0.0, 10, None),
        (0.5, 1, None),
    ],
)
def test_an_average_that_cannot_catch_up_is_said(decay, steps, words):
    notice = slow_average_notice(decay, steps)
    assert notice is None if words is None else words in notice


@pytest.mark.parametrize("steps", [*range(2, 40), 100, 1001, 40_000, 1_000_000, 10**8])
def test_the_decay_that_is_advised_catches_up(steps):
    notice = slow_average_notice(0.05 ** (0.9 / (steps - 1)), steps)
    advised = float(re.search(r"--ema.decay (\S+)", notice)[1])
    assert 0.0 < advised < 1.0 and slow_average_notice(advised, steps) is None
