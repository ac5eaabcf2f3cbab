"""Every call of a run that writes fails in turn: the run goes on with a warning or ends with one line, and loses nothing."""

import errno
import json
import re
from pathlib import Path

import pytest
from forking import forked
from launching import ROOT, WORKERS
from tiny_run import RESNET, images, supervised_arguments

TRAIN = ROOT / "launch" / "train.py"
ERRORS = (errno.ENOSPC, errno.EACCES, errno.EIO)


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """A run that has been stopped after three of five steps, with a checkpoint, a student and results."""
    return Disk(tmp_path_factory.mktemp("disk"))


class Disk:
    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, images(folder / "data")
        (folder / "disk").mkdir()
        done = forked(TRAIN, *self.arguments(folder / "begun", "--run.stop_after", 3))
        assert done.returncode == 0, done.stderr
        # a run whose calls are counted and none of which fails
        (self.dry,) = self.run([])
        assert self.dry["ended"] == "finished", self.dry
        self.calls = [tuple(call) for call in self.dry["all"]]

    def arguments(self, run_dir: Path, *more) -> list[str]:
        words = ("--student_kwargs", json.dumps(RESNET), "--schedule.epochs", 1, "--run.eval_every", 0.4)
        words += ("--run.save_every", 1, "--run.keep_last", 1, "--run.resume", "auto", "--run.log_every", 1)
        words += (
            "--run.monitors",
            "tensorboard,csv",
            "--run.progress",
            "plain",
            "--ema.decay",
            0.5,
            "--run.pictures",
            1,
        )
        return [str(word) for word in supervised_arguments(self.data, run_dir, *words, *more)]

    def run(self, faults: list, again: bool = False) -> list[dict]:
        """What the worker tells of a dry run, and of a run with each of the faults."""
        work, told = self.folder / "disk" / "run", self.folder / "told.jsonl"
        plan = {"begun": str(self.folder / "begun"), "work": str(work), "arguments": self.arguments(work)}
        plan |= {"faults": faults, "told": str(told), "again": again}
        (self.folder / "plan.json").write_text(json.dumps(plan))
        done = forked(WORKERS / "failing_runs.py", self.folder / "plan.json")
        assert done.returncode == 0, done.stderr[-3000:]
        return [json.loads(line) for line in told.read_text().splitlines()]

    def places(self, per_kind: int) -> list[int]:
        """Numbers of calls, at most `per_kind` of each (kind, file), without counters in names: the first ones and the last."""
        by_kind: dict[tuple[str, str], list[int]] = {}
        for number, (kind, path) in enumerate(self.calls):
            name = re.sub(r"events\.out.*", "events", re.sub(r"csv/.*", "csv", re.sub(r"\d+", "N", path)))
            by_kind.setdefault((kind, name), []).append(number)
        return sorted({n for found in by_kind.values() for n in [*found[: per_kind - 1], found[-1]]})


def judge(found: dict) -> None:
    what = f"call {found['at']}, {found['call']}, {errno.errorcode[found['errno']]}, lasting {found['lasting']}: "
    what += json.dumps({"ended": found["ended"], "said": found["said"][-2000:], "left": found["left"]})
    assert "Traceback" not in found["ended"] + found["said"], what
    assert "Exception in thread" not in found["said"], what
    left = found["left"]
    assert "error" not in left and not left["damaged"], what
    # the checkpoint that was there before, or a later one
    assert left["newest"] >= "step00000003", what
    if found["ended"] == "finished":
        assert left["step"] == 5 and left["newest"] == "step00000005", what
        lines = [line for line in found["said"].splitlines() if line.startswith("warning")]
        # what failed once is said once
        assert len(lines) <= (4 if found["lasting"] else 1), what
    else:
        line = found["ended"].removeprefix("line: ")
        assert line != found["ended"] and "\n" not in line and 20 < len(line) < 700, what
        assert any(word in line for word in ("run.dir", "could not be written", "cannot be written", "disk")), what
    if again := found.get("again"):
        assert again["ended"] == "finished" and again["left"]["step"] == 5 and not again["left"]["damaged"], (
            what,
            again,
        )


def test_the_calls_of_a_run_are_seen(disk):
    """Checkpoints with their average, student, card, results, configuration, curves, and a lock."""
    paths = " ".join(path for _, path in disk.calls)
    for part in (
        *(
            "config.json",
            "tensorboard/events",
            "csv/",
            "shards_rank0",
            "rng_rank0.pt",
            "buffers",
            "engine.json",
            "state.json",
        ),
        *("student_ema", "manifest.json", "latest.json", "evaluation.json", "run/.student.safetensors", "results.json"),
    ):
        assert part in paths, part
    assert {kind for kind, _ in disk.calls} == {"open", "write", "mkdir", "rename", "fsync", "save"}
    assert len(disk.calls) > 200


def test_a_call_that_fails_costs_a_warning_or_a_line_and_nothing_else(disk):
    """Every eighth kind of call and file, each with one of three errors, every seventh for good."""
    places = disk.places(1)
    assert len(places) > 60
    faults = [[place, ERRORS[n % 3], n % 7 == 0] for n, place in enumerate(places[::8])]
    for found in disk.run(faults)[1:]:
        judge(found)


@pytest.mark.slow
@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
def test_every_call_that_fails_costs_a_warning_or_a_line_and_the_same_command_goes_on(disk, number, lasting):
    """And once the disk is in order, the same command ends the run."""
    for found in disk.run([[place, number, lasting] for place in disk.places(3)], again=True)[1:]:
        judge(found)
