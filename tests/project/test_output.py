"""Output that nobody reads any more: it costs no work, and no command shows a traceback for it."""

import os
import pty
import subprocess
import sys

import pytest
from launching import ROOT, environment, free_port
from tiny_run import images, supervised_arguments

# prints in all ways that a run does, and ends as a command that did its work
TALKS = """
import logging, os, sys, warnings
from scalekd_ds.process import output
from scalekd_ds.errors import run_cli

def main():
    if {trains}:
        output.goes_on("training")
    from rich.console import Console
    log = logging.getLogger("other")
    log.addHandler(logging.StreamHandler(sys.stdout))
    for number in range(700):
        print("step", number, "\\u2713 \\udcff", "x" * 80, flush=number % 2 == 0)
        print("to standard error", file=sys.stderr)
        log.warning("of a library")
        Console().print("[bold]a table\\u2501[/bold]")
        warnings.warn(f"warning {{number}}")
    # the descriptors are those of no other file
    assert os.open(os.devnull, os.O_RDONLY) > 2
    open("done", "w").write("all of it")

run_cli(main)
"""


def talk(tmp_path, trains: bool, redirected: str, **variables):
    """Runs it in a shell with the redirection that follows the command; the status is that of the command."""
    script = tmp_path / "talks.py"
    script.write_text(TALKS.format(trains=trains))
    command = f"set -o pipefail; {sys.executable} {script} {redirected}"
    env = environment(PYTHONPATH=str(ROOT), **variables)
    return subprocess.run(["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)


# name -> (redirection, what is said of it on standard error, where that is left)
ENDS = {
    "a reader that has read enough": ("| head -n 3", ""),
    "no reader of standard error": ("2>&1 >/dev/null | head -n 3", ""),
    "no reader of both": ("2>&1 | head -n 3", ""),
    "a full disk": (">/dev/full", "No space left on device"),
    "a full disk for standard error": ("2>/dev/full >/dev/null", ""),
    "a full disk for both": (">/dev/full 2>&1", ""),
    "closed from the start": (">&-", ""),
    "standard error closed from the start": ("2>&- >/dev/null", ""),
    "all closed from the start": ("<&- >&- 2>&-", ""),
    "nothing to read": ("<&- >/dev/null", ""),
}


@pytest.mark.parametrize("trains", [True, False], ids=["training", "verb"])
@pytest.mark.parametrize("end", ENDS)
def test_output_that_cannot_be_written_costs_no_work(tmp_path, end, trains):
    redirected, said = ENDS[end]
    done = talk(tmp_path, trains, redirected)
    assert (tmp_path / "done").read_text() == "all of it"
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr, done.stderr[-2000:]
    # a command whose result is lost on a full disk has failed; a run has its results elsewhere
    failed = not trains and end in ("a full disk", "a full disk for both")
    assert done.returncode == (2 if failed else 0)
    if said:
        line = (
            f"error: standard output cannot be written: {said}."
            if failed
            else f"warning: standard output cannot be written ({said}): training goes on"
        )
        assert done.stderr.splitlines().count(line) == 1


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437", "utf-16", "ascii:strict", "utf-8:strict"])
def test_output_that_cannot_be_encoded_costs_no_work(tmp_path, encoding):
    done = talk(tmp_path, True, ">said 2>&1", PYTHONIOENCODING=encoding)
    assert done.returncode == 0 and (tmp_path / "done").exists()
    said = (tmp_path / "said").read_bytes()
    assert b"Traceback" not in said and len(said) > 100_000


@pytest.mark.parametrize(
    "locale", [{"LC_ALL": "C"}, {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
def test_output_in_the_locale_of_a_bare_machine(tmp_path, locale):
    done = talk(tmp_path, True, ">said 2>&1", **locale)
    assert done.returncode == 0 and "Traceback" not in (tmp_path / "said").read_text(errors="replace")


@pytest.mark.parametrize("trains", [True, False], ids=["training", "verb"])
def test_a_terminal_that_is_lost_costs_no_work(tmp_path, trains):
    """As `nohup` or `setsid` leave it when the window is closed: there is no signal, and every write fails (EIO)."""
    script = tmp_path / "talks.py"
    script.write_text(TALKS.format(trains=trains))
    ours, theirs = pty.openpty()
    env = environment(PYTHONPATH=str(ROOT), TERM="xterm")
    command = [sys.executable, str(script)]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=env, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    os.read(ours, 100)
    os.close(ours)
    assert process.wait(120) == (0 if trains else 2)
    assert (tmp_path / "done").exists()


def test_a_terminal_that_is_not_ready_gets_everything(tmp_path):
    """Another program may leave it non-blocking, and a write then fails while its buffer is full."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    script = tmp_path / "talks.py"
    script.write_text(TALKS.format(trains=True))
    env = environment(PYTHONPATH=str(ROOT))
    command = [sys.executable, str(script)]
    process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=writing, stderr=subprocess.DEVNULL)
    os.close(writing)
    with open(reading, "rb") as file:
        said = file.read()
    assert process.wait(120) == 0
    assert all(f"step {number} ".encode() in said for number in range(700))


VERBS = {
    "nothing": [],
    "help": ["--help"],
    "version": ["--version"],
    "recipes": ["recipes"],
    "train --help": ["train", "--help"],
    "list": ["train", "--list-recipes"],
    "completion": ["completion", "bash"],
    "a mistake": ["trian"],
}


@pytest.mark.parametrize(
    "redirected",
    [
        "| true",
        ">&- 2>&-",
        *(pytest.param(r, marks=pytest.mark.slow) for r in ("2>&1 | true", "| head -n 1", ">&-", "2>&-")),
    ],
)
@pytest.mark.parametrize("verb", VERBS)
def test_verbs_end_quietly_where_their_reader_goes_away(tmp_path, verb, redirected):
    words = " ".join(VERBS[verb])
    command = f"set -o pipefail; {sys.executable} -m scalekd_ds {words} {redirected}"
    env = environment(PYTHONPATH=str(ROOT))
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr, done.stderr
    assert done.returncode == (2 if verb in ("a mistake", "nothing") else 0)


HOW = {
    "alone": "launch/train.py",
    "--gpus": "-m scalekd_ds train --gpus 2",
    "launcher": "-m deepspeed.launcher.runner --num_accelerators 2 --master_port PORT launch/train.py",
}
CLOSED = {
    "pipe": "2>&1 | head -n 30 >/dev/null",
    "pipe of standard output": "2>said | head -n 5 >/dev/null",
    "full": ">/dev/full 2>&1",
    "closed": "<&- >&- 2>&-",
    "ascii": "--run.progress bar >said 2>&1",
}
QUICK = {("alone", "pipe")}


@pytest.mark.parametrize(
    ("how", "closed"),
    [
        pytest.param(how, closed, marks=() if (how, closed) in QUICK else pytest.mark.slow)
        for how in HOW
        for closed in CLOSED
    ],
)
def test_a_run_is_finished_without_anybody_to_read_it(tmp_path, how, closed):
    run_dir = tmp_path / "run"
    arguments = supervised_arguments(images(tmp_path / "data"), run_dir, "--micro_batch_size", 4)
    arguments += ["--schedule.epochs", 8, "--run.log_every", 1, "--run.progress", "plain"]
    said = tmp_path / "said"
    start = f"{sys.executable} {HOW[how].replace('PORT', str(free_port()))} {' '.join(map(str, arguments))}"
    command = f"set -o pipefail; {start} {CLOSED[closed].replace('said', str(said))}"
    env = environment(PYTHONPATH=str(ROOT), PYTHONIOENCODING="ascii" if closed == "ascii" else "")
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (run_dir / "results.json").is_file() and (run_dir / "student.safetensors").is_file()
    assert "Exception ignored" not in done.stderr + (said.read_text() if said.exists() else "")
