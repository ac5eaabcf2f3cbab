"""What ends a job, injected into real ones: signals, ranks that die, fall silent or hang, NaN, a full disk."""

import json
import os
import signal
import socket
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from forking import ended, forked, forked_in_background, forked_ranks
from launching import LIMIT, ROOT, WORKERS
from safetensors.torch import load_file
from tiny_run import RESNET, images, scalars, supervised_arguments

from scalekd_ds.checkpoint.layout import checkpoints_of
from scalekd_ds.checkpoint.load import choose_checkpoint
from scalekd_ds.cluster.heartbeat import EXIT_LOST

TRAIN = ROOT / "launch" / "train.py"
FAULTY = WORKERS / "faulty_train.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return images(tmp_path_factory.mktemp("data"))


def arguments(data, run_dir, *more):
    slim = ("--micro_batch_size", 4, "--run.log_every", 1, "--student_kwargs", json.dumps(RESNET))
    return supervised_arguments(data, run_dir, *slim, *more)


@contextmanager
def job(tmp_path, script, *args):
    """A run on two ranks in the background: its ranks, and the file that they write into."""
    log = tmp_path / "job.log"
    with forked_in_background(script, *args, log=log, ranks=2) as ranks:
        yield ranks, log


def wait_for_checkpoint(run_dir, ranks, log) -> None:
    deadline = time.monotonic() + LIMIT
    while not checkpoints_of(run_dir):
        assert all(rank.is_alive() for rank in ranks) and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.05)


ENDLESS = ("--schedule.epochs", 4000, "--run.save_every", 5, "--run.eval_every", 0)


@pytest.mark.parametrize(
    ("number", "rank"), [(signal.SIGTERM, 0), pytest.param(signal.SIGUSR1, 1, marks=pytest.mark.slow)]
)
def test_a_signal_to_one_rank_saves_on_all_and_ends_well(data, tmp_path, number, rank):
    run_dir = tmp_path / "run"
    args = arguments(data, run_dir, *ENDLESS, "--run.resume", "auto")
    with job(tmp_path, TRAIN, *args) as (ranks, log):
        wait_for_checkpoint(run_dir, ranks, log)
        os.kill(ranks[rank].pid, number)
        assert ended(ranks) == [0, 0]
    newest = choose_checkpoint(run_dir, "auto")
    step = int(newest.name[4:])
    told = log.read_text()
    assert f"stopped at step {step} of" in told and "--run.resume auto goes on" in told
    assert not list((run_dir / "checkpoints").glob(".partial*"))
    # with fewer epochs than are done it ends like any other run, and what was never evaluated is
    short = forked(TRAIN, *args, "--schedule.epochs", 1)
    assert short.returncode == 0 and f"nothing is left to train after step {step}" in short.stdout, short.stderr
    results = json.loads((run_dir / "results.json").read_text())
    assert results["step"] == step >= results["total_steps"] == 5 and results["top1"] >= 0
    # on another number of ranks, too
    on = forked(TRAIN, *args, "--run.stop_after", step + 2)
    assert on.returncode == 0 and f"from {newest.name}" in on.stdout, on.stderr
    assert "is of 2 ranks, this run has 1" in on.stdout


def test_a_dead_rank_is_named_and_ends_the_others(data, tmp_path):
    run_dir = tmp_path / "run"
    with job(tmp_path, TRAIN, *arguments(data, run_dir, *ENDLESS)) as (ranks, log):
        wait_for_checkpoint(run_dir, ranks, log)
        victim = ranks[1].pid
        os.kill(victim, signal.SIGKILL)
        assert ended(ranks) == [EXIT_LOST, -signal.SIGKILL]
    named, told = f"rank 1 on {socket.gethostname()} (process {victim}, step", log.read_text()
    assert named in told and "start again with --run.resume auto" in told, told
    assert choose_checkpoint(run_dir, "auto") is not None


@pytest.mark.slow
def test_a_silent_rank_is_named_and_ends_the_others(data, tmp_path):
    """A process that is stopped stands for a node behind a cut link: nothing closes, nothing answers."""
    run_dir = tmp_path / "run"
    with job(tmp_path, TRAIN, *arguments(data, run_dir, *ENDLESS, "--run.rank_timeout", 15)) as (ranks, log):
        wait_for_checkpoint(run_dir, ranks, log)
        victim = ranks[1].pid
        os.kill(victim, signal.SIGSTOP)
        ranks[0].join(LIMIT)
        assert ranks[0].exitcode == EXIT_LOST
    told = log.read_text()
    assert f"rank 1 on {socket.gethostname()} (process {victim}" in told, told
    assert "is dead or cannot be reached: no word for 15 s" in told


def test_a_hang_leaves_the_stacks_of_every_rank(data, tmp_path):
    run_dir = tmp_path / "run"
    with job(tmp_path, FAULTY, "hang:3", *arguments(data, run_dir, *ENDLESS, "--run.hang_timeout", 12)) as (ranks, log):
        assert EXIT_LOST in ended(ranks)
    told = log.read_text()
    assert "no rank got on for 12 s (rank 0 at step 3, rank 1 at step 3)" in told, told
    stacks = (run_dir / "stacks" / "rank1.txt").read_text()
    assert "in faulty" in stacks and "faulty_train.py" in stacks
    assert (run_dir / "stacks" / "rank0.txt").is_file()


@pytest.mark.parametrize("config", [pytest.param("zero0", marks=pytest.mark.slow), "zero1", "zero3"])
def test_a_step_with_nan_is_skipped_and_counted(data, tmp_path, config):
    run_dir = tmp_path / "run"
    args = arguments(data, run_dir, "--schedule.epochs", 2, "--run.ds_config", config, "--ema.decay", 0.9)
    done = forked_ranks(FAULTY, "nan:2,5", *args)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert list(scalars(run_dir)["optim/skipped_steps"].values()) == [0, 0, 1, 1, 1, 2, 2, 2, 2, 2]
    weights = load_file(run_dir / "student.safetensors")
    assert all(torch.isfinite(w).all() for w in weights.values())


def test_nan_without_end_stops_the_run_with_a_report(data, tmp_path):
    run_dir = tmp_path / "run"
    args = arguments(data, run_dir, "--schedule.epochs", 2, "--run.max_skipped", 3)
    done = forked_ranks(FAULTY, "nan:2,3,4,5,6,7", *args)
    told = done.stdout + done.stderr
    assert done.returncode != 0 and "gradients were not finite in 3 steps in a row, the last step 4" in told, told[
        -3000:
    ]
    report = json.loads((run_dir / "nonfinite_rank1.json").read_text())
    assert report["step"] == 4 and len(report["samples"]) == 4
    assert all(Path(name).is_file() for name in report["samples"].values())
    images = report["tensors"]["images of the last micro batch"]
    assert images["nonfinite"] == 4 * 3 * 32 * 32 and images["shape"] == [4, 3, 32, 32]
    assert report["tensors"]["weights 0"]["nonfinite"] == 0


def test_a_full_disk_keeps_the_checkpoint_before_it(data, tmp_path):
    if os.geteuid() != 0:
        pytest.skip("a small file system can only be mounted by root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        run_dir = disk / "run"
        args = arguments(data, run_dir, "--schedule.epochs", 4, "--run.save_every", 2, "--run.resume", "auto")
        # there is room for a few checkpoints
        done = forked(TRAIN, *args, "--run.keep_last", 99)
        assert done.returncode == 2
        kept = choose_checkpoint(run_dir, "auto").name
        assert "step00000002" <= kept < "step00000020" and f"{kept} is kept, and training goes on: free" in done.stderr
        assert "the last checkpoint could not be written" in done.stderr and "Traceback" not in done.stderr, done.stderr
        # the next start would lose all that it trains
        full = forked(TRAIN, *args)
        (line,) = [line for line in full.stderr.splitlines() if line.startswith("error")]
        assert full.returncode == 2 and "MiB free, and a checkpoint of this run takes" in line, line
        assert choose_checkpoint(run_dir, "auto").name == kept
        subprocess.run(["mount", "-o", "remount,size=9m", str(disk)], check=True)
        on = forked(TRAIN, *args)
        assert on.returncode == 0 and f"from {kept}" in on.stdout, on.stderr[-2000:]
    finally:
        subprocess.run(["umount", str(disk)], check=True)
