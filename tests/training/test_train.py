"""Whole runs through the real launcher: every ZeRO config on two ranks, resume after kill -9, plain weights, TensorBoard."""

import json
import math
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from chatter import foreign_lines
from forking import ended, forked, forked_in_background, forked_ranks
from launching import LIMIT, ROOT, WORKERS, environment, free_port, launch, launcher_command
from safetensors.torch import load_file
from source_fixtures import write_tar
from tiny_run import SWIN, TERMS, arguments, images, scalars, supervised_arguments

from scalekd_ds.checkpoint.layout import checkpoints_of
from scalekd_ds.checkpoint.load import choose_checkpoint
from scalekd_ds.checkpoint.plain_weights import consolidate

TRAIN = ROOT / "launch" / "train.py"
STACKED = WORKERS / "stacked_train.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return images(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("config", ["zero0", "zero1", "zero2", "zero3"])
def test_two_ranks_train_with_each_ds_config(data, tmp_path, monkeypatch, config):
    """bf16 autocast, gradient accumulation over two micro batches, ten steps; the last through DeepSpeed's launcher.

    Nothing is compiled for it: many a machine has no compiler, and no cache that can be written.
    """
    monkeypatch.setenv("CXX", "/bin/false")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/proc/nowhere")
    run_dir, port = tmp_path / "run", free_port()
    job = (TRAIN, *arguments(data, run_dir, "--run.ds_config", config))
    through_launcher = config == "zero3"
    done = launch(*job, launcher=("--master_port", str(port))) if through_launcher else forked_ranks(*job, port=port)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    if through_launcher:
        assert not foreign_lines(done.stdout + done.stderr)
    # of which DeepSpeed would take 66 MB a rank, and end by a bus error where there is less
    assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"))
    results = json.loads((run_dir / "results.json").read_text())
    assert results["step"] == results["total_steps"] == 10
    assert results["world_size"] == 2

    logged = scalars(run_dir)
    total = logged["loss/total"]
    assert sorted(total) == list(range(1, 11))
    assert total[10] < 0.85 * total[1]
    for step, value in total.items():
        assert sum(logged[f"loss/{term}"][step] for term in TERMS) == pytest.approx(value, rel=1e-4)
    assert logged["optim/lr"][10] == pytest.approx(0.0, abs=1e-9)
    assert logged["weight/kd"][1] == 0.5
    assert all(v > 0 for v in logged["optim/grad_norm"].values())
    for name in ("system/images_per_s", "system/share_data_wait", "system/share_teacher", "val/top1", "val/top5"):
        assert all(v >= 0 for v in logged[name].values())
    assert 0 < logged["system/share_teacher"][5] < 1
    assert {"val/teacher_top1", "val/teacher_top5"} <= set(logged)
    assert logged["val/top1"][10] == pytest.approx(results["top1"], rel=1e-5)

    state = consolidate(run_dir)
    final = load_file(run_dir / "student.safetensors")
    assert all(torch.equal(state[k], final[k]) for k in final) and set(state) == set(final)
    card = json.loads((run_dir / "student.json").read_text())
    model = timm.create_model(card["architecture"], num_classes=card["num_classes"], **card["model_kwargs"])
    model.load_state_dict(state, strict=True)
    assert state["bn1.num_batches_tracked"] == 20
    assert all(v.dtype == torch.float32 for k, v in state.items() if "num_batches" not in k)
    # ZeRO's own files hold the projectors and no teacher
    assert sum(v.numel() for v in state.values()) < 500_000


def test_zero_stages_agree_in_fp32(data, tmp_path):
    """The same run at ZeRO 0 and 3, without autocast: the same losses step by step."""
    losses = {}
    for stage in (0, 3):
        config = tmp_path / f"fp32_zero{stage}.json"
        zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
        config.write_text(json.dumps({"zero_optimization": zero, "gradient_clipping": "auto"}))
        run_dir = tmp_path / f"run{stage}"
        # SGD: Adam turns the rounding noise of gradients that are analytically zero into steps of full size
        more = ("--run.ds_config", config, "--run.stop_after", 5, "--optim.clip", 1.0, "--optim.name", "sgd")
        more += ("--optim.lr", 0.02)
        # a ViT: its position embedding and class token belong to the root, which ZeRO-3 must fetch all the same
        vit = {"img_size": 32, "patch_size": 8, "embed_dim": 36, "depth": 3, "num_heads": 3}
        vit_student = (
            "--student",
            "vit_tiny_patch16_224",
            "--student_kwargs",
            json.dumps(vit),
            "--student_taps",
            "null",
        )
        # and the way through the projectors that accelerators take, whose parameters ZeRO-3 must fetch for the pair
        script = TRAIN if stage == 0 else STACKED
        done = forked_ranks(script, *arguments(data, run_dir, *more, *vit_student))
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        losses[stage] = scalars(run_dir)["loss/total"]
    assert list(losses[0].values()) == pytest.approx(list(losses[3].values()), rel=2e-5)


def start(data, run_dir, *more):
    """The launcher of a run on two ranks, in a session of its own."""
    return subprocess.Popen(
        [*launcher_command(), str(TRAIN), *map(str, arguments(data, run_dir, *more))],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def wait_for_checkpoint(run_dir, processes):
    """Returns once the run has its first checkpoint, or has ended."""
    deadline = time.time() + LIMIT
    while not checkpoints_of(run_dir) and all(p.is_alive() for p in processes) and time.time() < deadline:
        time.sleep(0.02)


def test_a_run_killed_in_mid_epoch_resumes_bit_for_bit(data, tmp_path):
    more = ("--run.save_every", 4, "--run.ds_config", "zero3", "--student_kwargs.drop_path_rate", 0.2)
    more += ("--data.random_crop", "true", "--data.hflip", 0.5, "--run.resume", "auto", "--schedule.epochs", 3)
    more += ("--data.auto_augment", "rand-m9-n2-mstd0.5-inc1", "--data.random_erasing", 0.25)
    more += ("--data.mixup", 0.8, "--data.cutmix", 1.0, "--ema.decay", 0.9)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert forked_ranks(TRAIN, *arguments(data, whole, *more)).returncode == 0

    job = TRAIN, *arguments(data, cut, *more)
    # leaving the block is kill -9 of both ranks: no handler runs, nothing is flushed
    with forked_in_background(*job, log=tmp_path / "log", ranks=2) as ranks:
        wait_for_checkpoint(cut, ranks)
    saved = [p.name for p in checkpoints_of(cut)]
    assert saved and saved[-1] < "step00000015", "the run was over before it was killed"
    assert forked_ranks(*job).returncode == 0

    ours, theirs = scalars(cut), scalars(whole)
    for name in ("loss/total", "optim/grad_norm", "optim/lr", *(f"loss/{t}" for t in TERMS)):
        assert ours[name] == theirs[name], name
    assert sorted(theirs["loss/total"]) == list(range(1, 16))
    a, b = (load_file(d / "student.safetensors") for d in (cut, whole))
    assert all(torch.equal(a[k], b[k]) for k in b)
    assert [p.name for p in checkpoints_of(cut)] == ["step00000012", "step00000015"]
    assert not list((cut / "checkpoints").glob(".partial-*"))


@pytest.mark.slow
@pytest.mark.parametrize("config", ["zero1", "zero2", "zero3"])
def test_twelve_kills_at_random_moments_change_no_bit(data, tmp_path, config):
    """Forty steps on two ranks, killed also while they start, save and evaluate; BatchNorm student, average on."""
    more = ("--run.save_every", 2, "--run.ds_config", config, "--run.resume", "auto", "--schedule.epochs", 8)
    more += ("--ema.decay", 0.9, "--data.random_crop", "true", "--run.eval_every", 1)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert start(data, whole, *more).wait(timeout=LIMIT) == 0
    rng = np.random.default_rng(0)
    for _ in range(12):
        reached = len(scalars(cut)["loss/total"]) if (cut / "tensorboard").exists() else 0
        process = start(data, cut, *more)
        # some of the way on, so that twelve lives are enough for forty steps
        deadline, ahead = time.time() + LIMIT, int(rng.integers(0, 5))
        while process.poll() is None and time.time() < deadline:
            found = checkpoints_of(cut)
            if found and int(found[-1].name[4:]) >= min(36, reached + ahead):
                break
            time.sleep(0.02)
        time.sleep(rng.uniform(0.0, 1.0))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert start(data, cut, *more).wait(timeout=LIMIT) == 0
    a, b = (load_file(d / "student.safetensors") for d in (cut, whole))
    assert all(torch.equal(a[k], b[k]) for k in b)
    c, d = (consolidate(run, "student") for run in (cut, whole))
    assert all(torch.equal(c[k], d[k]) for k in d)


@pytest.mark.parametrize("config", [pytest.param("zero1", marks=pytest.mark.slow), "zero3"])
def test_consolidated_logits_are_the_engines_bit_for_bit(data, tmp_path, config):
    worker = WORKERS / "logits_worker.py"
    run_dir, engine_file = tmp_path / "run", tmp_path / "engine.safetensors"
    done = forked_ranks(worker, engine_file, *arguments(data, run_dir, "--run.ds_config", config))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    out, logits = tmp_path / "plain.safetensors", tmp_path / "logits.safetensors"
    done = forked(ROOT / "launch" / "consolidate.py", run_dir, out)
    assert done.returncode == 0, done.stderr
    assert "resnet18" in done.stdout
    done = forked(ROOT / "launch" / "evaluate.py", out, "--data", data, "--batch-size", 4, "--logits", logits)
    assert done.returncode == 0, done.stderr
    assert "top-1" in done.stdout and "(11 images)" in done.stdout
    plain = load_file(logits)["logits"]
    for rank in range(2):
        assert torch.equal(load_file(f"{engine_file}.rank{rank}")["logits"], plain)


def test_a_swin_trained_without_a_teacher_is_the_next_runs_teacher(data, tmp_path):
    """The quickstart's path: a Swin trained with --teacher none is the next run's teacher, from its file."""
    swin = tmp_path / "swin"
    common = ("--data.root", data, "--global_batch_size", 8, "--run.log_every", 5)
    done = forked(
        TRAIN, "--recipe", "fashion-teacher", *common, "--run.dir", swin, "--student_kwargs", json.dumps(SWIN)
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(scalars(swin)) >= {"loss/ce", "loss/total", "val/top1"}
    weights = swin / "student.safetensors"
    student = tmp_path / "student"
    more = ("--teacher", weights, "--data.train_images", 30, "--run.dir", student)
    more += ("--schedule.epochs", 2, "--schedule.warmup_epochs", 0)
    done = forked(TRAIN, "--recipe", "fashion-scalekd", *common, *more)
    assert done.returncode == 0, done.stderr[-3000:]
    accuracy = json.loads((swin / "results.json").read_text())["top1"]
    assert json.loads((student / "results.json").read_text())["teacher_top1"] == pytest.approx(accuracy)
    done = forked(ROOT / "launch" / "evaluate.py", weights, "--data", data / "val")
    assert f"top-1 {accuracy:.2f}%" in done.stdout, done.stdout + done.stderr
    assert json.loads((student / "student.json").read_text())["teacher"] == str(weights)


def test_a_used_run_folder_is_not_overwritten_and_stop_after_resumes(data, tmp_path):
    run_dir = tmp_path / "run"
    # an interval of less than a step is each step
    args = supervised_arguments(data, run_dir, "--schedule.epochs", 2, "--run.eval_every", 0.01)
    assert forked(TRAIN, *args, "--run.stop_after", 4).returncode == 0
    assert [p.name for p in checkpoints_of(run_dir)] == ["step00000004"]
    assert sorted(scalars(run_dir)["val/top1"]) == [1, 2, 3, 4]
    first = json.loads((run_dir / "results.json").read_text())
    again = forked(TRAIN, *args)
    assert again.returncode == 2
    assert "already holds 1 checkpoint(s), the last step00000004: add --run.resume auto" in again.stderr
    on = forked(TRAIN, *args, "--run.resume", "auto")
    assert on.returncode == 0 and "from step00000004" in on.stdout, on.stderr
    results = json.loads((run_dir / "results.json").read_text())
    assert results["step"] == 10
    # the best of both starts, and the time of both
    step, top1 = max(scalars(run_dir)["val/top1"].items(), key=lambda pair: (pair[1], -pair[0]))
    assert results["best"] == {"top1": pytest.approx(top1), "step": step} and results["seconds"] > first["seconds"] > 0


def kill_while_saving(data, run_dir, kills: int) -> None:
    """Saves at every step and is killed, again and again, at moments that have nothing to do with its own."""
    more = ("--run.save_every", 1, "--run.keep_last", 2, "--run.resume", "auto", "--schedule.epochs", 4000)
    args, log = arguments(data, run_dir, *more, "--run.progress", "none"), run_dir.with_suffix(".log")
    moments = np.random.default_rng(0).uniform(0.0, 0.5, kills)
    reached = -1
    for moment in moments:
        with forked_in_background(TRAIN, *args, log=log) as (process,):
            deadline = time.time() + LIMIT
            # let it get past what the one before had saved
            while process.is_alive() and time.time() < deadline:
                found = checkpoints_of(run_dir)
                if found and int(found[-1].name[4:]) > reached + 2:
                    break
                time.sleep(0.005)
            time.sleep(moment)
            assert process.is_alive(), log.read_text()[-2000:]
        newest = choose_checkpoint(run_dir, "auto")
        assert newest is not None and int(newest.name[4:]) > reached
        consolidate(newest)
        reached = int(newest.name[4:])


def test_a_kill_while_saving_leaves_the_last_good_checkpoint(data, tmp_path):
    kill_while_saving(data, tmp_path / "run", kills=2)


@pytest.mark.slow
def test_two_hundred_kills_while_saving_leave_a_good_checkpoint(data, tmp_path):
    kill_while_saving(data, tmp_path / "run", kills=200)


def test_a_run_on_tars_with_every_augmentation_survives_damaged_images(data, tmp_path):
    """WebDataset in, RandAugment, erasing, mixup and cutmix, repeated and balanced order, one member that is no image."""
    for name in ("train", "val"):
        members = []
        for number, path in enumerate(sorted((data / name).rglob("*.jpg"))):
            members.append((f"{path.parent.name}/{number:04d}.jpg", path.read_bytes()))
        if name == "train":
            # a balanced order may leave one of a class out
            members[5:8] = [(member, b"not an image") for member, _ in members[5:8]]
        (tmp_path / "tars").mkdir(exist_ok=True)
        write_tar(tmp_path / "tars" / f"{name}-000.tar", members)
    run_dir = tmp_path / "run"
    more = ("--data.train", "train-{000..000}.tar", "--data.val", "val-000.tar", "--data.max_bad_share", 0.5)
    more += ("--data.auto_augment", "rand-m9-n2-mstd0.5-inc1", "--data.random_erasing", 0.25, "--data.mixup", 0.2)
    more += ("--data.cutmix", 1.0, "--data.repeats", 2, "--data.balanced", "true", "--data.random_crop", "true")
    done = forked_ranks(TRAIN, *arguments(tmp_path / "tars", run_dir, *more))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    logged = scalars(run_dir)
    assert all(math.isfinite(value) for value in logged["loss/total"].values()) and len(logged["loss/total"]) == 10
    # each of the two ranks counts what it meets
    assert 2.0 <= logged["data/bad_files"][10] <= 6.0
    assert "train-000.tar" in done.stdout + done.stderr and "is no image" in done.stdout + done.stderr
    assert json.loads((run_dir / "results.json").read_text())["step"] == 10


def test_a_disk_that_vanishes_in_mid_epoch_ends_the_run_which_then_resumes(data, tmp_path):
    here, run_dir = tmp_path / "data", tmp_path / "run"
    shutil.copytree(data, here)
    more = ("--data.keep_mb", 0, "--run.resume", "auto", "--run.save_every", 2, "--run.eval_every", 0)
    args = supervised_arguments(here, run_dir, *more, "--schedule.epochs", 2000)
    log = tmp_path / "log"
    with forked_in_background(TRAIN, *args, log=log) as processes:
        wait_for_checkpoint(run_dir, processes)
        (here / "train").rename(tmp_path / "gone")
        status = ended(processes)
    text = log.read_text()
    told = [line for line in text.splitlines() if "cannot be read any more" in line]
    assert status != [0] and len(told) == 1, text[-2000:]
    assert str(here / "train") in told[0] and "Traceback" not in text
    saved = choose_checkpoint(run_dir, "auto")
    assert saved is not None
    step = int(saved.name[4:])
    (tmp_path / "gone").rename(here / "train")
    on = forked(TRAIN, *args, "--run.stop_after", step + 2)
    assert on.returncode == 0 and f"from {saved.name}" in on.stdout, on.stderr[-2000:]
