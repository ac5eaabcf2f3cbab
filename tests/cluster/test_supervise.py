"""launch/supervise.py: what is started again, on which nodes, and what is not."""

import json
import sys

import psutil
import pytest
import tiny_run
from launching import LIMIT, ROOT, free_port, in_background, run, wait_until

from scalekd_ds.checkpoint.layout import checkpoints_of
from scalekd_ds.commands.supervise import select_nodes

SUPERVISE = ROOT / "launch" / "supervise.py"


def arguments(tmp_path, slots, *more):
    hosts = tmp_path / "hosts"
    hosts.write_text(f"localhost slots={slots}\n")
    launcher = f"--no_ssh_check --master_addr 127.0.0.1 --master_port {free_port()}"
    own = ["--hostfile", hosts, "--wait", "0", "--deepspeed-args", launcher]
    own += ["--doctor-args", "--skip bandwidth all-reduce --min-memory 0 --min-disk 0"]
    return [sys.executable, SUPERVISE, *own, *more]


# each rank is started twice, which takes half a minute of a processor
@pytest.mark.parametrize("slots", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_job_whose_rank_dies_is_started_again_and_finishes(tmp_path, slots):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    more = ["--micro_batch_size", 4, "--schedule.epochs", 20, "--run.save_every", 5, "--run.eval_every", 0]
    more += ["--student_kwargs.channels", "[8, 8, 8, 8]"]
    job = tiny_run.supervised_arguments(tiny_run.images(tmp_path / "data"), run_dir, *more)
    with in_background(arguments(tmp_path, slots, "--", *job), log) as process:
        wait_until(lambda: checkpoints_of(run_dir), process, log)
        ranks = [
            p
            for p in psutil.Process(process.pid).children(recursive=True)
            if f"--local_rank={slots - 1}" in p.cmdline()
        ]
        ranks[-1].kill()
        assert process.wait(LIMIT) == 0, log.read_text()
    told = log.read_text()
    assert "supervisor: start 0 on localhost" in told and "supervisor: start 1 on localhost" in told
    assert "4 restart(s) left" in told or "5 restart(s) left" in told
    assert "resuming" in told and "supervisor: finished" in told
    assert json.loads((run_dir / "results.json").read_text())["step"] == 100


def test_a_job_that_fails_by_a_users_mistake_is_not_started_again(tmp_path):
    job = ["--recipe", "fashion-ce", "--data.root", tmp_path / "nowhere", "--run.dir", tmp_path / "run"]
    done = run(arguments(tmp_path, 1, "--max-restarts", 1, "--", *job), LIMIT)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert str(tmp_path / "nowhere") in done.stdout + done.stderr


def test_as_many_nodes_are_used_as_can_share_the_batch():
    four = {f"node{i}": 8 for i in range(4)}
    assert select_nodes(four, 2048) == four
    # 24 GPUs cannot share 2,048 images evenly, 16 can
    assert list(select_nodes({k: four[k] for k in ("node0", "node1", "node3")}, 2048)) == ["node0", "node1"]
    assert select_nodes(four, 7) == {} and select_nodes({}, 8) == {}
