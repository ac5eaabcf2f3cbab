"""Signals to commands and to runs, at every moment: what is saved, what is said, and that no process is left behind."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import tiny_run
from forking import forked, forked_ranks
from launching import LIMIT, ROOT, WORKERS, environment, free_port, in_background, run, wait_until

from scalekd_ds.checkpoint.layout import checkpoints_of
from scalekd_ds.checkpoint.load import choose_checkpoint

TRAIN = ROOT / "launch" / "train.py"
SIGNALLED = WORKERS / "signalled_train.py"
# a shell starts what runs in the background with SIGINT ignored, which a terminal does not
FOREGROUND = [
    sys.executable,
    "-c",
    "import os, signal, sys; signal.signal(2, signal.default_int_handler); os.execvp(sys.argv[1], sys.argv[1:])",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_run.images(tmp_path_factory.mktemp("data"))


def arguments(data, run_dir, *more):
    slim = ("--student_kwargs.channels", "[8, 8, 8, 8]", "--micro_batch_size", 4)
    slim += ("--run.log_every", 1, "--run.eval_every", 1, "--run.pictures", 1, "--data.eval_batch_size", 4)
    return tiny_run.supervised_arguments(data, run_dir, *slim, *more)


# -- any command -----------------------------------------------------------------------------------------------------

COMMAND = """
import os, signal, sys, threading, time
from pathlib import Path
from scalekd_ds.errors import UserError, run_cli

def main():
    {work}

run_cli(main)
"""
SEND = "os.kill(os.getpid(), signal.{}); "
# what a command is doing when the signal comes
WORK = {
    "waiting": SEND + "time.sleep(60)",
    "computing": "threading.Timer(0.3, os.kill, (os.getpid(), signal.{})).start()\n    while True: pass",
    "in another library's loop": SEND
    + "\n    while True:\n        try: time.sleep(60)\n        except BaseException: pass",
    "where an error replaces it": "\n    try: "
    + SEND
    + "time.sleep(60)\n    except BaseException as e: raise ValueError('other') from e",
    "where a mistake replaces it": "\n    try: "
    + SEND
    + "time.sleep(60)\n    except BaseException as e: raise UserError('other') from e",
    "in a child": "import subprocess; threading.Timer(0.5, os.kill, (os.getpid(), signal.{})).start(); "
    "subprocess.run(['sleep', '61.5'])",
    "deaf": "import ctypes; threading.Timer(0.3, os.kill, (os.getpid(), signal.{})).start(); libc = ctypes.CDLL(None); "
    "[libc.sleep(60) for _ in range(9)]",
    "in a destructor": "\n    class A:\n        def __del__(self): {}time.sleep(60)\n    A()\n    time.sleep(60)",
}


def command(tmp_path, work: str, **more):
    script = tmp_path / "command.py"
    script.write_text(COMMAND.format(work=work))
    env = environment(PYTHONPATH=str(ROOT))
    return subprocess.run(
        [*FOREGROUND, sys.executable, script], env=env, capture_output=True, text=True, timeout=60, **more
    )


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("work", WORK)
def test_a_command_ends_with_one_line_and_the_status_of_shells(tmp_path, work, name):
    done = command(tmp_path, WORK[work].replace("{}", SEND if work == "in a destructor" else "{}").replace("{}", name))
    said = "Ctrl-C" if name == "SIGINT" else name
    assert (done.returncode, done.stdout) == (128 + signal.Signals[name], "")
    assert done.stderr.splitlines() == [f"stopped by {said}"], done.stderr
    assert not [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "61.5"]]


def test_what_was_begun_is_cleaned_up(tmp_path):
    work = "\n    try: os.kill(os.getpid(), signal.SIGINT); time.sleep(60)\n    finally: Path('clean').touch()"
    assert command(tmp_path, work, cwd=tmp_path).returncode == 130
    assert (tmp_path / "clean").exists()


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    press = "os.kill(os.getpid(), signal.SIGINT); time.sleep(60)"
    work = f"\n    try: {press}\n    finally: {press}"
    began = time.monotonic()
    done = command(tmp_path, work)
    assert done.returncode == 130 and done.stderr == "stopped by Ctrl-C: at once, at the second Ctrl-C\n"
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_that_was_ignored_from_the_start_stays_so(tmp_path, name):
    """As `nohup` ignores SIGHUP, and a script's `&` Ctrl-C."""
    work = SEND.replace("{}", name) + "time.sleep(0.2); print('worked')"
    (tmp_path / "command.py").write_text(COMMAND.format(work=work))
    ignoring = (
        f"import os, signal, sys; signal.signal(signal.{name}, signal.SIG_IGN); os.execvp(sys.argv[1], sys.argv[1:])"
    )
    done = run(
        [sys.executable, "-c", ignoring, sys.executable, tmp_path / "command.py"], 60, environment(PYTHONPATH=str(ROOT))
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "worked\n", "")


def test_a_signal_after_the_work_makes_no_failure_of_it(tmp_path):
    work = "import atexit; atexit.register(lambda: (os.kill(os.getpid(), signal.SIGINT), time.sleep(0.3)))"
    done = command(tmp_path, work)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_forked_child_answers_for_itself(tmp_path):
    work = (
        "pid = os.fork()\n    if pid == 0: time.sleep(60)\n    time.sleep(0.5); os.kill(pid, signal.SIGTERM)\n"
        "    status = os.waitpid(pid, 0)[1]; time.sleep(1.5); print(os.waitstatus_to_exitcode(status))"
    )
    done = command(tmp_path, work)
    assert (done.returncode, done.stdout, done.stderr) == (0, "-15\n", "")


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize(
    "verb",
    [
        ["recipes"],
        ["evaluate", "test_resnet", "--data", "DATA", "--weights", "none"],
        ["plan", "--recipe", "swin_l-resnet50-traditional", "--gpus", "16", "--gpu-memory", "40"],
        ["prepare-data", "fashion-mnist", "OUT/images"],
        ["prepare-data", "verify", "DATA"],
        ["inspect", "test_resnet", "DATA", "--weights", "none", "--out", "OUT/sheet.png"],
        ["doctor", "--hostfile", "HOSTS", "--json", "OUT/report.json"],
    ],
    ids=lambda verb: " ".join(verb[:2]),
)
def test_a_verb_leaves_nothing_half_written(data, tmp_path, verb, name, seconds):
    """The delay stands for a moment: whatever the verb does by then, it ends in one of two ways."""
    out, hosts = tmp_path / "out", tmp_path / "hosts"
    out.mkdir()
    hosts.write_text("localhost slots=2\n")
    words = [w.replace("DATA", str(data)).replace("OUT", str(out)).replace("HOSTS", str(hosts)) for w in verb]
    log = tmp_path / "log"
    with in_background(
        [*FOREGROUND, sys.executable, "-m", "scalekd_ds", *words], log, environment(PYTHONPATH=str(ROOT))
    ) as process:
        time.sleep(seconds)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.Signals[name])
        status = process.wait(60)
        assert not psutil.wait_procs(children, 10)[1]
    told = log.read_text()
    assert "Traceback" not in told and "Exception ignored" not in told
    finished = status in (0, 1, 2)
    # before Python has begun with the command, the signal does what it does to any process
    assert finished or status in (128 + signal.Signals[name], -signal.Signals[name]), told
    left = [path for path in out.iterdir() if not path.name.startswith(".")]
    assert finished or not left, left


# -- one run, at every moment ----------------------------------------------------------------------------------------

# before the first step: there is nothing to save
EARLY = ["indexing", "joining", "building", "engine", "deaf-engine"]
# step -> a checkpoint of it; evaluations are at steps 5 and 10, which is the last, and the student is written before that
STOPS = {"step@3": 3, "step@5": 5, "step@10": 10, "evaluating": 5, "drawing": 6, "finishing": 10}
# all is done but for words
LATE = ["results", "card", "exit"]
SIGNALS = ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"]
IN_CI = {("deaf-engine", "SIGINT"), ("evaluating", "SIGINT"), ("step@3", "SIGHUP"), ("exit", "SIGINT")}


def sweep(moments):
    pairs = [(moment, name) for moment in moments for name in SIGNALS]
    return pytest.mark.parametrize(
        ("moment", "name"), [pytest.param(*p, marks=() if p in IN_CI else pytest.mark.slow) for p in pairs]
    )


def one_run(data, run_dir, moment, names, *more):
    return forked(SIGNALLED, moment, names, *arguments(data, run_dir, "--schedule.epochs", 2, *more))


def told(done) -> str:
    text = done.stdout + done.stderr
    assert "Traceback" not in text and "Exception ignored" not in text, text[-3000:]
    return text


@sweep(EARLY)
def test_a_signal_before_the_first_step_ends_with_a_line(data, tmp_path, moment, name):
    done = one_run(data, tmp_path / "run", moment, name)
    assert done.returncode == 128 + signal.Signals[name], told(done)
    said = "Ctrl-C" if name == "SIGINT" else name
    assert told(done).count(f"stopped by {said}: no step was done, and nothing is lost") == 1
    assert not checkpoints_of(tmp_path / "run")


@sweep(STOPS)
def test_a_signal_while_it_trains_or_evaluates_saves(data, tmp_path, moment, name):
    run_dir = tmp_path / "run"
    done = one_run(data, run_dir, moment, name)
    assert done.returncode == 0, told(done)
    said = "Ctrl-C" if name == "SIGINT" else name
    assert (
        told(done).count(f"stopped at step {STOPS[moment]} of 10 ({said}); the same command with --run.resume auto")
        == 1
    )
    assert choose_checkpoint(run_dir, "auto").name == f"step{STOPS[moment]:08d}"
    assert not (run_dir / "results.json").exists()
    # as a run that was never stopped: what is to be evaluated is, once
    on = forked(TRAIN, *arguments(data, run_dir, "--schedule.epochs", 2, "--run.resume", "auto"))
    assert on.returncode == 0, told(on)
    evaluated = tiny_run.scalars(run_dir)["val/top1"]
    assert sorted(evaluated) == [5, 10]


@sweep(LATE)
def test_a_signal_when_all_is_done_changes_nothing(data, tmp_path, moment, name):
    run_dir = tmp_path / "run"
    done = one_run(data, run_dir, moment, name)
    assert done.returncode == 0, told(done)
    assert "stopped" not in told(done)
    assert (run_dir / "results.json").is_file() and (run_dir / "student.safetensors").is_file()
    assert choose_checkpoint(run_dir, "auto").name == "step00000010"


@pytest.mark.slow
@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_while_the_last_checkpoint_is_written_loses_nothing(data, tmp_path, name):
    """It is written beside the last evaluation, which may have ended by then."""
    run_dir = tmp_path / "run"
    done = one_run(data, run_dir, "saving", name)
    assert done.returncode == 0, told(done)
    assert ("stopped at step 10 of 10" in told(done)) != (run_dir / "results.json").exists()
    assert choose_checkpoint(run_dir, "auto").name == "step00000010"


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["step@3", "evaluating", "saving"])
def test_a_second_ctrl_c_ends_a_run_at_once(data, tmp_path, moment):
    run_dir = tmp_path / "run"
    first = forked(TRAIN, *arguments(data, run_dir, "--schedule.epochs", 2, "--run.stop_after", 1))
    assert first.returncode == 0, told(first)
    done = one_run(data, run_dir, moment, "SIGINT,SIGINT", "--run.resume", "auto")
    assert done.returncode == 130, told(done)
    assert told(done).count("at once, at the second Ctrl-C") == 1
    # whatever was being written, a whole checkpoint is there
    on = forked(TRAIN, *arguments(data, run_dir, "--schedule.epochs", 2, "--run.resume", "auto"))
    assert on.returncode == 0, told(on)


@pytest.mark.slow
@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("moment", STOPS)
def test_a_signal_to_one_of_two_ranks_stops_both_at_the_same_step(data, tmp_path, moment, name):
    run_dir = tmp_path / "run"
    done = forked_ranks(SIGNALLED, moment, name, *arguments(data, run_dir, "--schedule.epochs", 3))
    assert done.returncode == 0, told(done)
    assert told(done).count("stopped at step") == 1
    assert choose_checkpoint(run_dir, "auto") is not None


# -- launchers ---------------------------------------------------------------------------------------------------------

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
            [*FOREGROUND, *map(str, start(how, tmp_path, job))],
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
        command = [*FOREGROUND, *map(str, start(how, tmp_path, job))]
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
