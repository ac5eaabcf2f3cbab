"""Signals to the processes of a job that was started by a launcher."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import tiny_run
from launching import LIMIT, ROOT, environment, free_port, wait_until
from signalling import arguments

from scalekd_ds.checkpoint.load import choose_checkpoint
from scalekd_ds.cluster import job as job_module
from scalekd_ds.cluster.job import Job

TRAIN = ROOT / "launch" / "train.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_run.images(tmp_path_factory.mktemp("data"))


STARTS = ["--gpus", "supervise", "deepspeed", "torchrun"]
# who gets it: the command alone, all processes of its terminal, or a process in between
WHOM = ["parent", "terminal", "node's launcher", "rank"]


def start(how: str, tmp_path, job: list) -> list:
    own = [sys.executable, "-m", "scalekd_ds"]
    if how == "--gpus":
        return [*own, "train", "--gpus", 2, *job]
    if how == "deepspeed":
        return ["deepspeed", "--num_accelerators", 2, "--master_port", free_port(), TRAIN, *job]
    if how == "torchrun":
        return ["torchrun", "--nproc_per_node", 2, "--master_port", free_port(), TRAIN, *job]
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=2\n")
    launcher = f"--no_ssh_check --master_addr 127.0.0.1 --master_port {free_port()}"
    doctor = "--skip bandwidth all-reduce --min-memory 0 --min-disk 0"
    more = ["--wait", 0, "--deepspeed-args", launcher, "--doctor-args", doctor]
    return [*own, "supervise", "--hostfile", hosts, *more, "--", *job]


def words(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def of_run(run_dir) -> list[int]:
    """All processes of the machine whose command line names the run, by their numbers."""
    return [p.pid for p in psutil.process_iter() if str(run_dir) in words(p)]


def signalled(tmp_path, data, how: str, name: str, whom: str, presses: int = 1):
    """A run on two ranks that gets signals while it trains: (status, log, its folder); all its processes have ended."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    job = arguments(data, run_dir, "--schedule.epochs", 4000, "--run.eval_every", 0, "--run.progress", "plain")
    with log.open("w") as output:
        process = subprocess.Popen(
            [*map(str, start(how, tmp_path, job))],
            cwd=ROOT,
            env=environment(PYTHONPATH=str(ROOT)),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        wait_until(lambda: "step 5/" in log.read_text(), process, log)
        children = psutil.Process(process.pid).children(recursive=True)
        launchers = [p for p in children if "deepspeed.launcher.launch" in words(p)]
        ranks = [p for p in children if "--local_rank=1" in words(p) or (how == "torchrun" and str(TRAIN) in words(p))]
        ranks = [p for p in ranks if p not in launchers]
        for press in range(presses):
            if press:
                time.sleep(0.5)
            if whom == "terminal":
                os.killpg(process.pid, signal.Signals[name])
            else:
                chosen = {
                    "parent": psutil.Process(process.pid),
                    "node's launcher": (launchers or [None])[0],
                    "rank": ranks[0],
                }
                chosen[whom].send_signal(signal.Signals[name])
        status = process.wait(LIMIT)
        deadline = time.monotonic() + 60
        while (left := of_run(run_dir)) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not left, log.read_text()[-3000:]
    finally:
        for pid in of_run(run_dir):
            os.kill(pid, signal.SIGKILL)
        process.wait()
    return status, log.read_text(), run_dir


def test_a_process_that_hears_no_signal_ends_at_the_second_ctrl_c(monkeypatch):
    """As a rank that is stopped, or that waits in a library which keeps Python's lock."""
    monkeypatch.setattr(job_module, "_AT_ONCE_S", 0.5)
    deaf = "import signal, time; [signal.signal(n, signal.SIG_IGN) for n in (2, 15)]; print('ready', flush=True); "
    job = Job([sys.executable, "-c", deaf + "time.sleep(600)"], stdout=subprocess.PIPE, text=True)
    assert job._process.stdout.readline() == "ready\n"
    job.pass_on(signal.SIGINT, "")
    time.sleep(0.8)
    assert job._process.poll() is None
    job.pass_on(signal.SIGINT, "")
    assert job.wait() == -signal.SIGKILL


LAUNCHED = [
    (how, name, whom)
    for how in STARTS
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGKILL")
    for whom in WHOM
    if not (whom == "node's launcher" and how == "torchrun")
    # a rank that is killed is another fault; so is torchrun's own end, which takes the ranks' store with it
    and not (name == "SIGKILL" and (whom in ("rank", "terminal") or how == "torchrun"))
    # the supervisor takes it for a node that fails, and starts the job again
    and not (how == "supervise" and whom == "node's launcher" and name in ("SIGINT", "SIGTERM"))
]
LAUNCHED_IN_CI = {("--gpus", "SIGINT", "parent")}


@pytest.mark.parametrize(
    ("how", "name", "whom"), [pytest.param(*c, marks=() if c in LAUNCHED_IN_CI else pytest.mark.slow) for c in LAUNCHED]
)
def test_a_signal_to_any_process_of_a_job_saves_and_ends_all(data, tmp_path, how, name, whom):
    status, text, run_dir = signalled(tmp_path, data, how, name, whom)
    newest = choose_checkpoint(run_dir, "auto")
    assert newest is not None, text[-3000:]
    assert text.count(f"stopped at step {int(newest.name[4:])} of") == 1, text[-3000:]
    # the launchers of others end as they do
    if how in ("--gpus", "supervise") and whom in ("parent", "terminal") and name != "SIGKILL":
        assert status == 0 and "Traceback" not in text, text[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("how", STARTS)
@pytest.mark.parametrize("whom", ["parent", "terminal"])
def test_a_second_ctrl_c_ends_a_job_at_once(data, tmp_path, how, whom):
    status, text, _ = signalled(tmp_path, data, how, "SIGINT", whom, presses=2)
    if how in ("--gpus", "supervise"):
        # the run may have ended by the first one meanwhile
        assert status in (0, 130) and "Traceback" not in text, text[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGKILL"])
@pytest.mark.parametrize("how", STARTS)
@pytest.mark.parametrize("seconds", [0.3, 2.0, 4.0, 7.0, 10.0])
def test_a_signal_while_a_job_starts_leaves_no_process(data, tmp_path, how, name, seconds):
    """The delay stands for a moment of the start, which shows nothing that could be waited for."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    job = arguments(data, run_dir, "--schedule.epochs", 4000, "--run.eval_every", 0)
    env = environment(PYTHONPATH=str(ROOT))
    with log.open("w") as output:
        command = [*map(str, start(how, tmp_path, job))]
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=output, stderr=output, start_new_session=True)
    try:
        time.sleep(seconds)
        process.send_signal(signal.Signals[name])
        status = process.wait(LIMIT)
        deadline = time.monotonic() + 60
        while (left := of_run(run_dir)) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not left, log.read_text()[-3000:]
    finally:
        for pid in of_run(run_dir):
            os.kill(pid, signal.SIGKILL)
        process.wait()
    if how in ("--gpus", "supervise") and name != "SIGKILL":
        assert "Traceback" not in log.read_text()
        # 0 where it trained already, or as the signal where Python itself had only begun
        assert status in (0, 128 + signal.Signals[name], -signal.Signals[name]), log.read_text()[-3000:]
