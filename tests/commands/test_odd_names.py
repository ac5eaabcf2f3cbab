"""Runs whose every name is odd, through each verb: folders above, classes, images, the run's own folder."""

import json
import os
import shlex
import subprocess
import sys

import pytest
import tiny_run
from forking import forked
from launching import ROOT, WORKERS, environment
from odd_names import ABOVE, ODD, path, stem
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scalekd_ds.commands import consolidate, evaluate, export, inspect, prepare_data
from scalekd_ds.commands.doctor import required_paths
from scalekd_ds.config import DataConfig, RunConfig
from scalekd_ds.data.run_sources import read_sources
from scalekd_ds.data.sources.shards import shards_of_pattern
from scalekd_ds.names import escape, is_unicode, utf8_path

TRAIN = ROOT / "launch" / "train.py"
NAMES = sorted(os.fsdecode(name) for name in ODD)
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def dataset(root, odd=ODD, train=2):
    """Odd classes of odd images of one colour each, and one more file that is no image."""
    for split, count in (("train", train), ("val", 1)):
        for kind, name in enumerate(odd):
            path(root, split, name).mkdir(parents=True)
            for i in range(count):
                file = path(root, split, name, stem(odd[(kind + 5 * i) % len(odd)]) + b"%d.png" % i)
                Image.new("RGB", (32, 32), (kind * 3 % 256, kind * 7 % 256, kind * 11 % 256)).save(file)
    path(root, "train", odd[0], b"new\nline\t\xff\x1b[31m.png").write_text("junk")
    return root


def arguments(root, run, *more):
    given = tiny_run.supervised_arguments(root, run, "--student_kwargs", json.dumps(tiny_run.RESNET), *more)
    return [*given, "--run.resume", "auto", "--run.log_every", 1, "--schedule.epochs", 1]


def lines_of(text):
    """The lines of an output, none of which moves a terminal or is a part of another."""
    lines = text.split("\n")
    assert all(line.isprintable() for line in lines), ascii(text)
    return lines


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return path(tmp_path_factory.mktemp("odd"), ABOVE)


@pytest.fixture(scope="module")
def run(place):
    """A run of two starts on odd images, with what the starts have printed."""
    root, run_dir = dataset(place / "data"), place / "-run"
    prepare_data.main(["verify", str(root)])
    first = forked(
        TRAIN, *arguments(root, run_dir), *("--run.progress", "json", "--run.stop_after", 3),
        *("--run.monitors", "tensorboard,csv"),
    )  # fmt: skip
    assert first.returncode == 0, first.stdout + first.stderr
    second = forked(TRAIN, *arguments(root, run_dir))
    assert second.returncode == 0, second.stdout + second.stderr
    return run_dir, first, second


def test_a_run_and_its_resumption_keep_every_name(place, run):
    run_dir, first, second = run
    objects = [json.loads(line) for line in first.stdout.splitlines()]
    assert objects[-1]["files"]["weights"] == str(run_dir / "student.safetensors")
    said = [line for line in lines_of(first.stderr) if "another of its class" in line]
    # the list of verify was read
    assert not said and objects[0]["kind"] and sum(o["kind"] == "report" for o in objects) == 1
    lines_of(second.stdout), lines_of(second.stderr)
    assert f"resuming {escape(run_dir)} from step00000003" in second.stdout
    assert "in another order" not in second.stdout and "are matched by name" not in second.stdout
    config = json.loads((run_dir / "config.json").read_text())
    assert config["data"]["root"] == str(place / "data") and config["run"]["dir"] == str(run_dir)
    card = json.loads((run_dir / "student.json").read_text())
    assert card["classes"] == NAMES
    assert list((run_dir / "csv").glob("*.csv"))
    events = []
    with utf8_path(run_dir / "tensorboard") as folder:
        board = EventAccumulator(folder)
        board.Reload()
        events = board.Tags()["scalars"]
        (text,) = board.Tensors("run/summary/text_summary")[:1]
    assert "val/top1" in events
    summary = text.tensor_proto.string_val[0].decode()
    assert shlex.quote("x") and escape(run_dir) in summary.replace("\\'", "'")


def test_the_commands_that_it_prints_work_in_a_shell(run, capsys):
    run_dir, _, second = run
    top1 = json.loads((run_dir / "results.json").read_text())["top1"]
    (line,) = [line.split("next", 1)[-1].strip() for line in lines_of(second.stdout) if "scalekd evaluate" in line]
    words = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True).stdout.split(
        b"\0"
    )
    assert words[:2] == [b"scalekd", b"evaluate"]
    evaluate.main([os.fsdecode(word) for word in words[2:-1]])
    assert f"top-1 {top1:.2f}%" in lines_of(capsys.readouterr().out)[-2]


def test_evaluate_inspect_and_consolidate_take_odd_names(place, run, capsys):
    run_dir = run[0]
    top1 = json.loads((run_dir / "results.json").read_text())["top1"]
    out = place / "c\udcfe\n$x_y$.safetensors"
    consolidate.main([str(run_dir), str(out)])
    assert json.loads(out.with_suffix(".json").read_text())["classes"] == NAMES
    evaluate.main([str(out), "--data", str(place / "data")])
    sheet = place / "sheet\n$a_b$[0].png"
    inspect.main([str(run_dir), str(place / "data"), "--out", str(sheet), "--images", str(len(ODD))])
    lines = lines_of(capsys.readouterr().out)
    assert any(f"top-1 {top1:.2f}%" in line for line in lines)
    # each class's folder was known by its name
    assert any(f"of {len(ODD)} shown right" in line for line in lines), lines
    assert Image.open(sheet).size[0] > 300


@pytest.mark.parametrize(
    "format",
    ["timm", *(pytest.param(f, marks=pytest.mark.slow) for f in ("hf", "onnx", "torchscript", "torch_export"))],
)
def test_exports_hold_texts_that_any_language_reads(place, run, format, capsys):
    if format == "onnx":
        pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    if format == "hf":
        pytest.importorskip("transformers", reason="transformers is not installed")
    out = place / f"out {format}\n"
    export.main([str(run[0]), str(out), "--format", format])
    lines_of(capsys.readouterr().out)
    (out / "README.md").read_text(encoding="utf-8")
    names = json.loads((out / "model.json").read_text())["classes"]
    assert all(map(is_unicode, names))
    assert names == [name if is_unicode(name) else escape(name) for name in NAMES]
    if format == "timm":
        assert json.loads((out / "config.json").read_text())["label_names"] == names
        evaluate.main([f"local-dir:{out}", "--data", str(place / "data")])
        top1 = json.loads((run[0] / "results.json").read_text())["top1"]
        assert f"top-1 {top1:.2f}%" in capsys.readouterr().out


@pytest.mark.parametrize("name", [*ODD, ABOVE], ids=ascii)
def test_each_odd_name_may_be_that_of_the_folder_of_the_data(tmp_path, name, capsys, monkeypatch):
    dataset(path(tmp_path, name), [b"a", b"b\n"], 1)
    monkeypatch.chdir(tmp_path)
    for root in (
        str(path(tmp_path, name)),
        os.fsdecode(name) if not name.startswith(b"-") else f"./{os.fsdecode(name)}",
    ):
        prepare_data.main(["verify", root])
        lines = lines_of(capsys.readouterr().out)
        assert lines[-2].startswith("1 of 5 images cannot be used: ")
        train, val = read_sources(RunConfig(data=DataConfig(root=root)))
        assert (len(train), len(val), train.classes) == (2, 2, ["a", "b\n"])
        # a pattern below it is one, and what exists is none
        shards = shards_of_pattern(os.path.join(root, "t-{000..012}.tar"), "data.train")
        assert len(shards) == 13 and all(os.path.dirname(shard) == os.path.normpath(root) for shard in shards)
        paths, _ = required_paths([f"--data.root={root}", "--data.train=t-{000..012}.tar"])
        assert paths["data.train (last)"] == os.path.normpath(os.path.join(root, "t-012.tar"))
    (tmp_path / "s-{0..1}.tar").write_text("")
    assert shards_of_pattern(str(tmp_path / "s-{0..1}.tar"), "data.train") == [str(tmp_path / "s-{0..1}.tar")]


@pytest.mark.slow
def test_each_odd_name_may_be_that_of_the_folder_of_a_run(tmp_path):
    root = dataset(tmp_path / "data", [b"a", b"b\n"], 8)
    more = ("--run.stop_after", 1, "--run.pictures", 0, "--data.max_bad_share", 0.2)
    for start in range(2):
        runs = [
            arguments(root, path(tmp_path, b"runs", name), *(more if not start else more[2:])) for name in [*ODD, ABOVE]
        ]
        (tmp_path / "runs.json").write_text(json.dumps([[str(word) for word in run] for run in runs]))
        done = forked(WORKERS / "train_many.py", tmp_path / "runs.json")
        assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-2000:])
        lines_of(done.stderr)
        assert sum(line.startswith("resuming ") for line in lines_of(done.stdout)) == start * len(runs)
    for name in [*ODD, ABOVE]:
        assert path(tmp_path, b"runs", name, b"student.safetensors").is_file()


@pytest.mark.slow
def test_a_run_in_a_locale_of_ascii_goes_on_in_one_of_utf8(tmp_path):
    """With an accent in each name: paths have other texts in the two locales."""
    place = tmp_path / "pêche \udcff"
    root = dataset(place / "data", ["pêche".encode(), b"\xff", "桃".encode()], 8)
    starts = [ASCII, {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "ascii"}]
    inherited = {k: v for k, v in environment().items() if k not in ("LC_ALL", "LANG", *ASCII)}
    for number, variables in enumerate(starts, 1):
        given = arguments(root, place / "rün", "--run.stop_after", number, "--data.max_bad_share", 0.2)
        done = subprocess.run(
            [sys.executable, TRAIN, *map(str, given)], env=inherited | variables, capture_output=True, cwd=ROOT
        )
        assert done.returncode == 0, done.stdout.decode(errors="replace") + done.stderr.decode(errors="replace")
        text = done.stdout.decode()
        assert number == 1 or "resuming " in text
        assert "other ones" not in text and "is from here on" not in text and "matched by name" not in text, text
        assert b"stale" not in done.stderr
        card = json.loads((place / "rün" / "student.json").read_text())
        assert card["classes"] == sorted(["pêche", "\udcff", "桃"])


@pytest.mark.slow
def test_two_ranks_of_the_launcher_take_odd_names(tmp_path):
    place = path(tmp_path, ABOVE)
    root = dataset(place / "data", [b"a", b"b\n"], 8)
    done = subprocess.run(
        [
            sys.executable,
            TRAIN,
            *map(str, arguments(root, place / "run")),
            "--gpus",
            "2",
            "--data.max_bad_share",
            "0.2",
        ],
        env=environment(),
        capture_output=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert (place / "run" / "student.safetensors").is_file()
