"""What a newcomer sees: `scalekd` alone, and a short run in a terminal of 80 columns, where only this package speaks."""

import fcntl
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
from concurrent.futures import ThreadPoolExecutor

import pytest
from launching import LIMIT, ROOT, environment
from tiny_run import arguments, images

from scalekd_ds.commands.dispatch import first_screen
from scalekd_ds.commands.verbs import GROUPS

COLUMNS = 80
# what a terminal obeys and does not show
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
# Every line that a run may show, from its start to its end. A line of another library is in none of these shapes.
SHAPES = [
    r" +student +teacher",
    r"(model|parameters|image|classes|before last stage|last stage|projectors|weights)  +\S.*",
    r"(run|images|course|devices|files)  +\S.*",
    # rows that go on in a further line
    r" {19}(\w+=[\d.]+ ?)+",
    r" {19}in \S+",
    r"(train|evaluate) +[━╸╺ ]* +\d+/\d+ steps [\d:-]+ left [\d:-]+",
    r"loss \d+\.\d{4} +\d+ img/s \(mean +\d+\)  data wait +\d+%  \d+\.\d GiB",
    r"(\w+ \d+\.\d{4}( {2}|$))+",
    r"step \d+ of \d+",
    r"[┏┳━┓┡╇┩└┴─┘]+",
    r"[┃│].*[┃│]",
    r"finished",
    r"(top-1|best|teacher|time|images|energy|weights|results|checkpoints|next)  +\S.*",
    r" +(--data \S+|tensorboard --logdir \S+)",
]


def on_a_terminal(command, cwd, **variables):
    """Runs a command on a pseudo-terminal of 80 columns: its exit status, and what it shows, without colours."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    env = environment(PYTHONPATH=str(ROOT), TERM="xterm-256color", **variables)
    for name in ("DS_ACCELERATOR", "COLUMNS", "LINES", "NO_COLOR", "SCALEKD_VERBOSE"):
        # what the other tests set, and a newcomer does not
        env.pop(name, None) if name not in variables else None
    process = subprocess.Popen(
        [sys.executable, "-m", "scalekd_ds", *map(str, command)],
        cwd=cwd,
        env=env,
        stdin=follower,
        stdout=follower,
        stderr=follower,
    )
    os.close(follower)
    shown = b""
    while True:
        try:
            chunk = os.read(leader, 65_536)
        except OSError:
            # the last process that held the terminal has ended
            break
        if not chunk:
            break
        shown += chunk
    os.close(leader)
    return process.wait(LIMIT), CONTROL.sub("", shown.decode())


def lines_of(shown: str) -> list[str]:
    """Each line as it was written, those apart that were drawn over with the same text."""
    return list(dict.fromkeys(line.rstrip() for line in re.split(r"[\r\n]+", shown) if line.strip()))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Ranks -> what a run of ScaleKD in one epoch shows: of one process, and of two that the launcher starts."""
    folder = tmp_path_factory.mktemp("newcomer")
    images(folder / "data")

    def run(name, *launcher):
        words = arguments("data", name, "--schedule.epochs", 1)
        status, shown = on_a_terminal(["train", *launcher, *words], folder)
        assert status == 0, shown[-3000:]
        return shown

    with ThreadPoolExecutor() as pool:
        one, two = pool.submit(run, "one"), pool.submit(run, "two", "--gpus", 2)
        return {1: one.result(), 2: two.result()}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_first_run_shows_only_our_own_lines_and_they_fit(runs, ranks):
    lines = lines_of(runs[ranks])
    foreign = [line for line in lines if not any(re.fullmatch(shape, line) for shape in SHAPES)]
    assert not foreign
    assert max(map(len, lines)) <= COLUMNS
    # one rank alone speaks
    assert runs[ranks].count("finished") == 1


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_tells_what_it_trains_how_far_it_is_and_what_to_do_next(runs, ranks):
    told = runs[ranks]
    name = {1: "one", 2: "two"}[ranks]
    for words in ("fashion-scalekd: resnet18, taught by swin_tiny_patch4_window7_224", "40 to train on, 11 to evaluate on"):
        assert words in told, words
    assert "1 epoch, 5 steps of 8 images" in told and f"{ranks} x CPU (1 thread), float32 (cpu_fp32)" in told
    assert re.search(rf"files +{name}\r", told)
    # the results are below the bar, and the commands last
    end = lines_of(told[told.rindex("finished") :])
    assert re.match(r"top-1 +\d+\.\d\d%", end[1]) and "5/5 steps" not in "".join(end)
    after = " ".join(line.split("next ", 1)[-1].strip() for line in end[-2:])
    evaluate, _, _ = after.partition("tensorboard")
    assert shlex.split(evaluate) == ["scalekd", "evaluate", f"{name}/student.safetensors", "--data", "data"]


def test_scalekd_alone_says_what_to_do_first(tmp_path):
    status, shown = on_a_terminal([], tmp_path)
    # a script whose variable for the verb is empty must not go on
    assert status == 2
    assert shown.replace("\r\n", "\n") == first_screen()
    lines = shown.splitlines()
    commands = [line.split() for line in lines if line.startswith("  ")]
    assert commands[0][:2] == ["scalekd", "quickstart"]
    known = {verb for verbs in GROUPS.values() for verb in verbs}
    assert all(word == "scalekd" and verb in known for word, verb, *_ in commands)
    assert lines[-1].startswith("Documents: https://") and max(map(len, lines)) <= COLUMNS and len(lines) < 24


SAYS = """
import logging, sys, warnings
from scalekd_ds.commands.quiet import CHATTER, without_chatter
without_chatter()
logging.basicConfig(stream=sys.stdout, format="%(message)s")
for name, beginnings in CHATTER.items():
    for text in beginnings:
        logging.getLogger(name).warning(text + " and so on")
    logging.getLogger(name).warning("the disk is full")
    logging.getLogger(name).error("it fails")
logging.getLogger("another").warning("of another")
warnings.warn("will be removed", FutureWarning)
"""


@pytest.mark.parametrize("verbose", ["", "0", "1"])
def test_only_chatter_is_left_out_and_a_variable_brings_it_back(verbose):
    env = environment(PYTHONPATH=str(ROOT), SCALEKD_VERBOSE=verbose)
    done = subprocess.run([sys.executable, "-c", SAYS], env=env, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines.count("the disk is full") == lines.count("it fails") >= 2 and "of another" in lines
    assert ("and so on" in done.stdout) == ("will be removed" in done.stderr) == (verbose == "1")
