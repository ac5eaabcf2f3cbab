"""Every verb with every path that it takes, where something odd lies at that path: it works, or ends in one line."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from forking import forked
from launching import ROOT
from odd_things import NAMES, OUT_SITUATIONS, PATHS, SITUATIONS, copied
from source_fixtures import as_nobody
from tiny_run import RESNET, images, supervised_arguments
from verb_ends import Ends
from written_caches import manifest_of, write_cache

from scalekd_ds.commands.verbs import VERBS
from scalekd_ds.teacher_cache.records import Layout

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass
class World:
    """What a user has: a folder of everything, one of its parts at a time replaced by something odd."""

    folder: Path

    def __getattr__(self, name: str) -> str:
        return str(self.folder / name)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    images(folder / "data")
    run = folder / "run"
    words = ("--student_kwargs", json.dumps(RESNET), "--schedule.epochs", 1, "--run.pictures", 0)
    done = forked(ROOT / "launch" / "train.py", *supervised_arguments(folder / "data", run, *words))
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("student.safetensors", "student.json", "config.json"):
        shutil.copy(run / name, folder / name)
    (folder / "checkpoint").symlink_to(next((run / "checkpoints").glob("step*")))
    (folder / "hosts").write_text("localhost slots=1\n")
    shutil.copy(ROOT / "ds_configs" / "cpu_fp32.json", folder / "ds.json")
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.zeros(3)}, folder / "weights.pth")
    rows = [
        f"data/val/{p.parent.name}/{p.name},{p.parent.name}\n" for p in sorted((folder / "data" / "val").rglob("*.jpg"))
    ]
    (folder / "table.csv").write_text("path,label\n" + "".join(rows))
    (folder / "image.jpg").write_bytes(next((folder / "data" / "val").rglob("*.jpg")).read_bytes())
    write_cache(folder / "cache", manifest_of(Layout(None, "int8", 3, None), samples=40, views=1, batch=8))
    return World(folder)


TRAIN = [
    "train",
    "--schedule.epochs",
    "1",
    "--run.pictures",
    "0",
    "--run.progress",
    "quiet",
    "--global_batch_size",
    "8",
]
TRAIN += ["--data.image_size", "32", "--run.ds_config", "cpu_fp32"]
QUICKSTART = ["quickstart", "--quick"]
AS_FAR_AS_THE_FIRST_RUN = ["--train-args", "--schedule.epochs", "-1"]
PLAN = ["plan", "--gpus", "1", "--gpu-memory", "8"]


def train(w: World, *words: str) -> list[str]:
    """A run of a slim student, whose last words count."""
    return [
        *TRAIN,
        "--data.root",
        w.data,
        "--run.dir",
        w.new,
        "--student",
        "resnet18",
        "--student_kwargs",
        json.dumps(RESNET),
        *words,
    ]


def cache(w: World, *words: str) -> list[str]:
    """A cache of the logits of a slim teacher."""
    teacher = ["--teacher", "resnet18", "--teacher_kwargs", json.dumps(RESNET | {"num_classes": 3})]
    run = [*TRAIN[1:], "--data.root", w.data, *teacher, "--teacher_weights", "none", "--distill.features", "false"]
    return ["cache", "--views", "1", *run, *words]


# slot -> (what is right there, the words of the command with the odd path X); a slot without a right thing is an output
INPUTS = {
    "train --config": ("config.json", lambda w, x: [*TRAIN, "--config", x, "--run.dir", w.new, "--data.root", w.data]),
    "train --data.root": ("data", lambda w, x: train(w, "--data.root", x)),
    "train --data.train": ("table.csv", lambda w, x: train(w, "--data.train", x, "--data.val", x)),
    "train --run.ds_config": ("ds.json", lambda w, x: train(w, "--run.ds_config", x)),
    "train --run.resume": ("checkpoint", lambda w, x: train(w, "--run.resume", x)),
    "train --student": ("student.safetensors", lambda w, x: train(w, "--student", x, "--student_kwargs", "{}")),
    "train --student_weights": ("student.safetensors", lambda w, x: train(w, "--student_weights", x)),
    "train --student_weights pth": ("weights.pth", lambda w, x: train(w, "--student_weights", x)),
    "train --teacher": ("student.safetensors", lambda w, x: train(w, "--teacher", x, "--distill.features", "false")),
    "train --teacher_cache": (
        "cache",
        lambda w, x: train(w, "--teacher", "resnet18", "--distill.features", "false", "--teacher_cache", x),
    ),
    "cache --info": ("cache", lambda w, x: ["cache", "--info", x]),
    "cache --verify": ("cache", lambda w, x: ["cache", "--verify", x]),
    "train --hostfile": ("hosts", lambda w, x: ["train", "--hostfile", x, "--gpus", "1"]),
    "evaluate MODEL": ("student.safetensors", lambda w, x: ["evaluate", x, "--data", w.data]),
    "evaluate --data": ("data", lambda w, x: ["evaluate", w.student + ".safetensors", "--data", x]),
    "evaluate --data table": ("table.csv", lambda w, x: ["evaluate", w.student + ".safetensors", "--data", x]),
    "evaluate --weights": ("weights.pth", lambda w, x: ["evaluate", "resnet18", "--data", w.data, "--weights", x]),
    "consolidate CKPT": ("run", lambda w, x: ["consolidate", x, w.new + ".safetensors"]),
    "consolidate CKPT of a step": ("checkpoint", lambda w, x: ["consolidate", x, w.new + ".safetensors"]),
    "export CKPT": ("run", lambda w, x: ["export", "--format", "torchscript", x, w.new]),
    "export FILE": ("student.safetensors", lambda w, x: ["export", "--format", "torch_export", x, w.new]),
    "push RUN": ("run", lambda w, x: ["push", x, "me/student", "--dry-run", "--out", w.new]),
    "inspect CKPT": ("run", lambda w, x: ["inspect", x, w.data, "--out", w.new + ".png", "--images", "1"]),
    "inspect IMAGES": ("image.jpg", lambda w, x: ["inspect", w.student + ".safetensors", x, "--out", w.new + ".png"]),
    "inspect --teacher": (
        "student.safetensors",
        lambda w, x: [
            "inspect",
            w.student + ".safetensors",
            w.data,
            "--teacher",
            x,
            "--out",
            w.new + ".png",
            "--images",
            "1",
        ],
    ),
    "inspect --baseline": (
        "student.safetensors",
        lambda w, x: [
            "inspect",
            w.student + ".safetensors",
            w.data,
            "--baseline",
            x,
            "--out",
            w.new + ".png",
            "--images",
            "1",
        ],
    ),
    "plan --config": ("config.json", lambda w, x: [*PLAN, "--config", x]),
    "plan --run.ds_config": (
        "ds.json",
        lambda w, x: [*PLAN, "--config", w.config + ".json", "--run.ds_config", x],
    ),
    "plan --student": (
        "student.safetensors",
        lambda w, x: [*PLAN, "--config", w.config + ".json", "--student", x, "--student_kwargs", "{}"],
    ),
    "prepare-data verify": ("data", lambda w, x: ["prepare-data", "verify", x]),
    "prepare-data --source": ("data", lambda w, x: ["prepare-data", "fashion-mnist", w.new, "--source", x]),
    "quickstart --data": ("data", lambda w, x: [*QUICKSTART, "--data", x, "--out", w.new, *AS_FAR_AS_THE_FIRST_RUN]),
    "doctor --hostfile": ("hosts", lambda w, x: ["doctor", "--hostfile", x, "--data.root", "nowhere/{"]),
    "supervise --hostfile": ("hosts", lambda w, x: ["supervise", "--hostfile", x, "--", "--config", "nowhere"]),
    "supervise --config": (
        "config.json",
        lambda w, x: [
            "supervise",
            "--hostfile",
            w.hosts,
            "--max-restarts",
            "-1",
            "--",
            "--config",
            x,
            "--run.dir",
            w.new,
        ],
    ),
}
OUTPUTS = {
    "train --run.dir": lambda w, x: train(w, "--run.dir", x),
    "cache --out": lambda w, x: cache(w, "--out", x),
    "train --dump-config": lambda w, x: train(w, "--dump-config", x),
    "evaluate --logits": lambda w, x: ["evaluate", w.student + ".safetensors", "--data", w.data, "--logits", x],
    "consolidate OUT": lambda w, x: ["consolidate", w.run, x],
    "export OUT torchscript": lambda w, x: ["export", "--format", "torchscript", w.run, x],
    "export OUT timm": lambda w, x: ["export", "--format", "timm", w.run, x, "--overwrite"],
    "push --out": lambda w, x: ["push", w.run, "me/student", "--dry-run", "--out", x, "--overwrite"],
    "inspect --out": lambda w, x: ["inspect", w.student + ".safetensors", w.data, "--out", x, "--images", "1"],
    "prepare-data fashion-mnist": lambda w, x: ["prepare-data", "fashion-mnist", x, "--limit", "20"],
    "quickstart --out": lambda w, x: [*QUICKSTART, "--data", w.data, "--out", x, *AS_FAR_AS_THE_FIRST_RUN],
    "supervise --run.dir": lambda w, x: [
        "supervise",
        "--hostfile",
        "nowhere",
        "--max-restarts",
        "0",
        "--",
        "--run.dir",
        x,
    ],
}
SUFFIX_OF = {"consolidate OUT": ".safetensors", "inspect --out": ".png"}


@pytest.fixture
def here(world, tmp_path, monkeypatch):
    """A folder to be in, with outputs of this test alone."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    world.__dict__["new"] = str(tmp_path / "new")
    return tmp_path


def place(world: World, slot: str, here: Path) -> tuple[Path, Path]:
    """The right thing of a slot, and where the odd one shall be, with the same suffix."""
    right = world.folder / INPUTS[slot][0]
    return right, here / f"odd{right.suffix}"


# they start processes on their nodes, plan for seconds, or write 70,000 images
SLOW = ("quickstart --data", "doctor --hostfile", "plan --config", "plan --run.ds_config")


def slots(names) -> list:
    """(slot, which situations: each eighth, or each, which takes minutes)."""
    few = [pytest.param(name, 8, marks=pytest.mark.slow if name in SLOW else ()) for name in names]
    return [*few, *(pytest.param(name, 1, marks=pytest.mark.slow) for name in names)]


def some(situations: dict, slot: str, every: int) -> dict:
    """Every so many situations, other ones for another slot."""
    first = sum(slot.encode()) % every
    return dict(list(situations.items())[first::every])


@pytest.mark.parametrize(("slot", "every"), slots(INPUTS))
def test_something_odd_where_an_input_should_be(world, here, slot, every):
    ends = Ends()
    for number, (name, make) in enumerate(some(SITUATIONS, slot, every).items()):
        folder = here / str(number)
        folder.mkdir()
        right, there = place(world, slot, folder)
        world.__dict__["new"] = str(folder / "new")
        try:
            make(right, there)
        except pytest.skip.Exception:
            continue
        line = ends.of(name, INPUTS[slot][1](world, str(there)))
        if name in ("nothing", "a circle of links", "a link to nowhere") and line is None:
            ends.wrong.append(f"{name}: works")
    ends.check()


@pytest.mark.slow
@pytest.mark.parametrize("slot", INPUTS)
def test_the_right_input_under_an_odd_name_works(world, here, slot):
    ends = Ends()
    for number, (name, raw) in enumerate(NAMES.items()):
        folder = here / str(number)
        folder.mkdir()
        right, there = place(world, slot, folder)
        there = folder / (os.fsdecode(raw) + there.suffix)
        world.__dict__["new"] = str(folder / "new")
        copied(right, there)
        ends.of(name, INPUTS[slot][1](world, str(there)))
    ends.check()


# where the root of the machine would be walked, which takes as long as there are files on it
WALKED = ("train --data.root", "train --data.train", "evaluate --data", "evaluate --data table", "prepare-data verify")


@pytest.mark.parametrize(("slot", "every"), slots([*INPUTS, *OUTPUTS]))
def test_a_path_that_cannot_be(world, here, slot, every):
    words_of = INPUTS[slot][1] if slot in INPUTS else OUTPUTS[slot]
    ends = Ends()
    for name, path in some(PATHS, slot, every).items():
        if slot in ("train --run.dir", "supervise --run.dir", "prepare-data fashion-mnist") and name in (
            "a dot",
            "a home",
        ):
            continue
        if name == "the root" and slot in (*WALKED, "inspect IMAGES"):
            continue
        ends.of(name, words_of(world, path.format(hosts=world.hosts) if "{" in path else path))
    ends.check()


@pytest.mark.parametrize(("slot", "every"), slots(OUTPUTS))
def test_something_odd_where_an_output_should_go(world, here, slot, every):
    ends = Ends()
    for number, (name, make) in enumerate(some(OUT_SITUATIONS, slot, every).items()):
        folder = here / str(number)
        folder.mkdir()
        there = folder / f"out{SUFFIX_OF.get(slot, '')}"
        make(there)
        line = ends.of(name, OUTPUTS[slot](world, str(there)))
        assert not [p for p in folder.iterdir() if "partial" in p.name], (name, list(folder.iterdir()))
        if name == "a folder with a file":
            assert (there / "mine.txt").read_text() == "kept"
        if name == "a file" and line is not None:
            assert there.read_text() == "kept"
    for number, (name, raw) in enumerate(some(NAMES, slot, every).items(), len(OUT_SITUATIONS)):
        folder = here / str(number)
        folder.mkdir()
        ends.of(name, OUTPUTS[slot](world, str(folder / (os.fsdecode(raw) + SUFFIX_OF.get(slot, "")))))
    ends.check()


@pytest.mark.parametrize("slot", OUTPUTS)
def test_an_output_where_nobody_may_write(world, here, slot):
    with as_nobody() as (folder, become):
        if os.geteuid() != 0:
            pytest.skip("the data of these tests can be read by its user alone")
        (folder / "shut").mkdir(mode=0o555)
        (folder / "dark").mkdir(mode=0o000)
        shutil.copytree(world.folder, folder / "world", symlinks=False)
        for path in (folder / "world").rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        theirs = World(folder / "world")
        theirs.__dict__["new"] = str(folder / "shut" / "new")
        become()
        ends = Ends()
        for where in ("shut", "dark"):
            line = ends.of(where, OUTPUTS[slot](theirs, str(folder / where / f"out{SUFFIX_OF.get(slot, '')}")))
            assert line is not None or ends.wrong, where
    ends.check()


@pytest.mark.parametrize("slot", INPUTS)
def test_an_input_that_nobody_may_read(world, here, slot):
    with as_nobody() as (folder, become):
        if os.geteuid() != 0:
            pytest.skip("the data of these tests can be read by its user alone")
        shutil.copytree(world.folder, folder / "world", symlinks=False)
        theirs = World(folder / "world")
        (folder / "mine").mkdir()
        (folder / "mine").chmod(0o777)
        theirs.__dict__["new"] = str(folder / "mine" / "new")
        for path in [folder / "world", *(folder / "world").rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)
        right = folder / "world" / INPUTS[slot][0]
        right.chmod(0)
        become()
        ends = Ends()
        line = ends.of("unreadable", INPUTS[slot][1](theirs, str(right)))
    ends.check()
    assert line is not None


def test_every_verb_with_a_path_is_tried():
    tried = {words.split(" ", 1)[0] for words in (*INPUTS, *OUTPUTS)}
    assert tried == set(VERBS) - {"recipes", "completion"}
