"""Every command of the documents is one that its verb takes, and runs, or says what it needs; every message is one of ours."""

import contextlib
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from image_fixtures import make_fashion
from launching import LIMIT, ROOT, environment

from scalekd_ds.recipes import RECIPES
from scalekd_ds.recipes.command_line import parse_run

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
STARTS = ("scalekd ", "python ", "deepspeed ", "make ", "tensorboard ", "sbatch ", "hf ", "pip ", "for ")
# what a reader has to have, where a comment behind a command says so
NEEDS = re.compile(r"#.*\b(needs|downloads)\b")
# placeholders that a reader fills in: such a command is parsed and cannot run as it stands
HOLES = re.compile(r"\b(DIR|NAME|FILE|ADDRESS|OUT|CKPT)\b|\.\.\.|\bN\b")


def commands_of(path):
    """The indented command lines of a document."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    return [line for line in lines if line.startswith(STARTS)]


COMMANDS = [(path.name, command) for path in DOCUMENTS for command in commands_of(path)]
VERBS = {
    "train",
    "evaluate",
    "consolidate",
    "export",
    "push",
    "inspect",
    "plan",
    "doctor",
    "supervise",
    "cache",
    "prepare-data",
    "recipes",
}


def words_of(command):
    """Words of a command without its comment."""
    return shlex.split(command, comments=True)


def verb_of(words):
    """(verb, its arguments) of a command that is one of ours, started in any of the ways; None for others."""
    if words[0] == "scalekd":
        return words[1], words[2:]
    scripts = [i for i, word in enumerate(words) if word.startswith("launch/") and word.endswith(".py")]
    if words[0] in ("python", "deepspeed") and scripts:
        return Path(words[scripts[0]]).stem.replace("_", "-"), words[scripts[0] + 1 :]
    return None


def test_there_are_commands():
    assert len(COMMANDS) > 40
    assert {"README.md", "cluster.md", "export.md", "performance.md"} <= {name for name, _ in COMMANDS}


@pytest.mark.parametrize(("name", "command"), COMMANDS, ids=lambda value: value[:60])
def test_a_command_is_one_that_is_taken(name, command):
    words = words_of(command)
    for recipe in re.findall(r"--recipe ([\w-]+)", command):
        assert recipe in RECIPES
    for script in [word for word in words if re.match(r"(launch|benchmarks|examples)/", word)]:
        assert (ROOT / script).exists()
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)
    found = verb_of(words)
    if found is None or "..." in words:
        return
    verb, arguments = found
    if verb in ("quickstart",):
        return
    assert verb in VERBS
    # placeholders for numbers
    arguments = ["1" if word == "N" else word for word in arguments]
    if verb in ("train", "recipes", "supervise"):
        parse = [word for word in arguments if word != "--list-recipes"]
        with contextlib.suppress(ValueError):
            parse = parse[parse.index("--") + 1 :]
        if "--config" in parse:
            place = parse.index("--config")
            parse = parse[:place] + parse[place + 2 :]
        skip = {"--gpus", "--hostfile"}
        parse = [w for i, w in enumerate(parse) if w not in skip and (i == 0 or parse[i - 1] not in skip)]
        assert parse_run(parse) is not None or not parse
    else:
        module = importlib.import_module(f"scalekd_ds.commands.{verb.replace('-', '_')}")
        module.parser().parse_known_args(arguments)


def literal(text):
    """Source or message with strings joined and white space folded."""
    text = re.sub(r'"\s*\n?\s*f?"', "", text)
    return re.sub(r"\s+", " ", text.replace("`", ""))


def test_every_message_of_the_handbook_is_one_that_is_given():
    source = literal("\n".join(path.read_text() for path in (ROOT / "scalekd_ds").rglob("*.py")))
    rows = [line for line in (ROOT / "docs" / "failures.md").read_text().splitlines() if line.startswith("| ")]
    messages = [found for row in rows for found in re.findall(r"`([^`]*)`", row.split(" | ")[0]) if " " in found]
    assert len(messages) > 20
    for message in messages:
        for part in message.split("..."):
            part = literal(part).strip(" ,;:.()")
            assert len(part) < 6 or part in source or part == "Bus error", (message, part)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkout's scripts beside runs/, with images of noise where the quickstart would write Fashion-MNIST."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("launch", "examples", "benchmarks", "scalekd_ds", "kernels", "ds_configs"):
        (folder / name).symlink_to(ROOT / name)
    make_fashion(folder / "runs" / "fashion-mnist", train=120, val=40)
    return folder


@pytest.mark.slow
def test_every_command_without_a_need_runs_in_the_order_of_the_documents(folder):
    """On 120 images, with what the quickstart leaves: teacher and two students of a few steps."""
    env = environment(PYTHONPATH=str(ROOT))
    first = [
        "scalekd train --recipe fashion-teacher --data.root runs/fashion-mnist --schedule.epochs 1 --schedule.warmup_epochs 0",
        *(
            f"scalekd train --recipe fashion-{kind} --data.train_images 100 --schedule.epochs 1 --schedule.warmup_epochs 0 "
            f"--run.dir runs/quickstart/{kind}-seed0"
            for kind in ("ce", "scalekd")
        ),
    ]
    ran = 0
    for name, command in [("", c) for c in first] + COMMANDS:
        words = words_of(command)
        if NEEDS.search(command) or HOLES.search(command) or words[0] in ("make", "tensorboard", "hf", "pip", "sbatch"):
            continue
        if words[0] == "python" and words[1].startswith("benchmarks/"):
            # minutes each; tests/test_benchmarks.py runs them small
            continue
        words = [sys.executable if word == "python" else word for word in words]
        small = ["--data.train_images", "100", "--schedule.epochs", "2", "--schedule.warmup_epochs", "0"]
        verb = verb_of(words_of(command))
        if verb and verb[0] in ("cache", "plan") and "fashion-scalekd" in words:
            words += small[:2]
        if "--recipe" in words and verb and verb[0] == "train" and name:
            recipe = words[words.index("--recipe") + 1]
            if not recipe.startswith("fashion-"):
                # ImageNet's: where only the file is written, it is written
                if "--dump-config" not in words:
                    continue
                small = []
            words += small
        done = subprocess.run(
            words, cwd=folder, env=env, capture_output=True, text=True, timeout=LIMIT, stdin=subprocess.DEVNULL
        )
        assert done.returncode == 0, (name, command, done.stdout[-2000:] + done.stderr[-3000:])
        ran += 1
    assert ran > 25
