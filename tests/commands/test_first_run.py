"""What a newcomer sees: `scalekd` alone, and a short run in a terminal of 80 columns, where only this package speaks."""

import re
import shlex
import subprocess
import sys

import pytest
from launching import ROOT, environment
from terminals import on_a_terminal
from tiny_run import arguments, images

from scalekd_ds.commands.dispatch import first_screen
from scalekd_ds.commands.verbs import GROUPS

COLUMNS = 80
# what a terminal obeys and does not show
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
# Every line that a run may show, from its start to its end. A line of another library is in none of these shapes.
SHAPES = [
    # while the images are listed
    r"(folders|images) of data/(train|val) [━╸╺]* +\d+/\d+ [\d:-]+",
    r"the teacher has no class names: .*|  .*\(0 is 'class_0', 2 is 'class_2'\)",
    r" +student +teacher",
    r"(model|parameters|image|classes|before last stage|last stage|projectors|weights)  +\S.*",
    r"(recipe|student|teacher|images|folder|course|devices|writes to)  +\S.*",
    # the weights of the loss go on in a further line
    r" {19}(\w+=[\d.]+ ?)+",
    r"(train|evaluate) +[━╸╺ ]* +\d+/\d+ steps [\d:-]+ left [\d:-]+",
    r"loss \d+\.\d{4} +\d+ img/s \(mean +\d+\)  data wait +\d+%  \d+\.\d GiB",
    r"(\w+ \d+\.\d{4}( {2}|$))+",
    r"step \d+ of \d+",
    r"[┏┳━┓┡╇┩└┴─┘]+",
    r"[┃│].*[┃│]",
    r"finished",
    r"(top-1|best|teacher|time|images|energy|weights|results|checkpoints|next)  +\S.*",
    r" +tensorboard --logdir \S+",
]


def on_a_newcomers_terminal(command, cwd, **variables):
    """Runs a command on a terminal of 80 columns: its exit status, and what it shows, without colours."""
    env = environment(PYTHONPATH=str(ROOT), TERM="xterm-256color", **variables)
    for name in ("DS_ACCELERATOR", "COLUMNS", "LINES", "NO_COLOR", "SCALEKD_VERBOSE"):
        # what the other tests set, and a newcomer does not
        env.pop(name, None) if name not in variables else None
    status, shown = on_a_terminal([sys.executable, "-m", "scalekd_ds", *command], COLUMNS, cwd, env)
    return status, CONTROL.sub("", shown)


def lines_of(shown: str) -> list[str]:
    """Each line as it was written, those apart that were drawn over with the same text."""
    return list(dict.fromkeys(line.rstrip() for line in re.split(r"[\r\n]+", shown) if line.strip()))


LAUNCHERS = {"alone": [], "two ranks": ["--gpus", 2]}


# the launcher's four processes load torch one after the other
@pytest.mark.parametrize("how", ["alone", pytest.param("two ranks", marks=pytest.mark.slow)])
def test_a_first_run_shows_only_our_own_lines_and_they_fit(tmp_path, how):
    images(tmp_path / "data")
    words = arguments("data", "mine", "--schedule.epochs", 1)
    status, told = on_a_newcomers_terminal(["train", *LAUNCHERS[how], *words], tmp_path)
    assert status == 0, told[-3000:]
    lines = lines_of(told)
    foreign = [line for line in lines if not any(re.fullmatch(shape, line) for shape in SHAPES)]
    assert not foreign
    assert max(map(len, lines)) <= COLUMNS
    # one rank alone speaks
    assert told.count("finished") == 1
    # what is trained, and on what
    before = lines_of(told[: told.index("finished")])
    start = dict(re.split(r" {2,}", line, maxsplit=1) for line in before if re.match(r"\w+( \w+)* {2,}\S", line))
    assert (start["recipe"], start["student"]) == ("fashion-scalekd", "resnet18")
    assert (start["images"], start["folder"]) == ("40 to train on, 11 to evaluate on", "data")
    assert start["course"].startswith("1 epoch, 5 steps of 8 images") and start["writes to"] == "mine"
    assert start["devices"] == f"{2 if LAUNCHERS[how] else 1} x CPU (1 thread), float32 (cpu_fp32)"
    # the results are below the bar, and the commands last
    end = lines_of(told[told.rindex("finished") :])
    assert re.match(r"top-1 +\d+\.\d\d%", end[1]) and "5/5 steps" not in "".join(end)
    evaluate, board = (line.split("next ")[-1].strip() for line in end[-2:])
    assert shlex.split(evaluate) == ["scalekd", "evaluate", "mine/student.safetensors", "--data", "data"]
    assert shlex.split(board) == ["tensorboard", "--logdir", "mine"]


def test_scalekd_alone_says_what_to_do_first(tmp_path):
    status, shown = on_a_newcomers_terminal([], tmp_path)
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
