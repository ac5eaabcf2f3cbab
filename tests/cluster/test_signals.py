"""Signals to commands and to runs, at every moment: what is saved, what is said, and that no process is left behind."""

import signal
import subprocess
import sys
import time

import psutil
import pytest
import tiny_run
from forking import forked, forked_ranks
from launching import ROOT, WORKERS, environment, in_background, run
from signalling import arguments

from scalekd_ds.checkpoint.layout import checkpoints_of
from scalekd_ds.checkpoint.load import choose_checkpoint

TRAIN = ROOT / "launch" / "train.py"
SIGNALLED = WORKERS / "signalled_train.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_run.images(tmp_path_factory.mktemp("data"))


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
    return subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, timeout=60, **more)


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


@pytest.mark.parametrize("name", ["SIGTERM", "SIGXCPU", "SIGHUP"])
def test_a_signal_while_python_ends_makes_no_failure_of_it(tmp_path, name):
    """SIGXCPU comes every second; Python has put the handlers back by the time it frees what is left."""
    work = "\n    class A:\n        def __del__(self, send=os.kill, me=os.getpid(), number=signal.{}): send(me, number)"
    work += "\n    globals()['left'] = A()"
    done = command(tmp_path, work.format(name))
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
    with in_background([sys.executable, "-m", "scalekd_ds", *words], log, environment(PYTHONPATH=str(ROOT))) as process:
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
