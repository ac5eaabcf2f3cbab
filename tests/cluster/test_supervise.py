"""launch/supervise.py: what is started again, on which nodes, and what is not."""

import json
import subprocess
import sys
import time

import psutil
from image_fixtures import make_dataset
from launching import ROOT, environment, free_port

from scalekd_ds.checkpoint.layout import checkpoints_of
from scalekd_ds.commands.supervise import usable

SUPERVISE = ROOT / "launch" / "supervise.py"


def arguments(tmp_path, *more):
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=2\n")
    launcher = f"--no_ssh_check --master_addr 127.0.0.1 --master_port {free_port()}"
    own = ["--hostfile", hosts, "--wait", "0", "--deepspeed-args", launcher]
    own += ["--doctor-args", "--skip bandwidth all-reduce --min-memory 0 --min-disk 0"]
    return [sys.executable, *map(str, [SUPERVISE, *own, *more])]


def test_a_job_whose_rank_dies_is_started_again_and_finishes(tmp_path):
    data = make_dataset(tmp_path / "data", train=40, val=11, classes=3, size=(32, 32))
    run_dir = tmp_path / "run"
    run = ["--recipe", "fashion-ce", "--data.root", data, "--run.dir", run_dir, "--data.train_images", "null"]
    run += ["--global_batch_size", 8, "--micro_batch_size", 4, "--schedule.epochs", 40, "--schedule.warmup_epochs", 0]
    run += ["--run.save_every", 5, "--run.eval_every", 0, "--student_kwargs.channels", "[8, 8, 8, 8]"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            arguments(tmp_path, "--", *run),
            cwd=ROOT,
            env=environment(),
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
        )
    deadline = time.time() + 120
    while not checkpoints_of(run_dir):
        assert process.poll() is None and time.time() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.05)
    ranks = [p for p in psutil.Process(process.pid).children(recursive=True) if "--local_rank=1" in p.cmdline()]
    ranks[-1].kill()
    assert process.wait(180) == 0, (tmp_path / "log").read_text()
    told = (tmp_path / "log").read_text()
    assert "supervisor: start 0 on localhost" in told and "supervisor: start 1 on localhost" in told
    assert "4 restart(s) left" in told or "5 restart(s) left" in told
    assert "resuming" in told and "supervisor: finished" in told
    assert json.loads((run_dir / "results.json").read_text())["step"] == 200


def test_what_the_user_has_to_mend_is_not_tried_again(tmp_path):
    run = ["--recipe", "fashion-ce", "--data.root", tmp_path / "nowhere", "--run.dir", tmp_path / "run"]
    done = subprocess.run(
        arguments(tmp_path, "--max-restarts", 1, "--", *run),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert str(tmp_path / "nowhere") in done.stdout + done.stderr


def test_as_many_nodes_as_can_share_the_batch():
    four = {f"node{i}": 8 for i in range(4)}
    assert usable(four, 2048) == four
    # 24 GPUs cannot share 2,048 images evenly, 16 can
    assert list(usable({k: four[k] for k in ("node0", "node1", "node3")}, 2048)) == ["node0", "node1"]
    assert usable(four, 7) == {} and usable({}, 8) == {}
