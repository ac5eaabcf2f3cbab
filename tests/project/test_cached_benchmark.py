"""The benchmark of teacher caches, at a size of seconds: what it measures is what it says, and goes into its JSON."""

import json

import pytest
from forking import forked_with
from image_fixtures import make_fashion
from launching import ROOT

SCRIPT = ROOT / "benchmarks" / "cached.py"
TINY = ("--pair", "tiny", "--images", "24", "--batch", "4", "--batches", "2", "--entries", "12", "--rounds", "2")


def run(*arguments, out):
    return forked_with([{"OUT": str(out), "DS_ACCELERATOR": "cpu"}], SCRIPT, *arguments)


def test_steps_writing_and_reading_are_measured(tmp_path):
    done = run(*TINY, "--store", "fp32", out=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = tmp_path.iterdir()
    assert path.name == "cached-tiny-cpu.json"
    result = json.loads(path.read_text())
    step, runs = result["step"], result["step"]["runs"]
    # both runs take the same step, on the same weights and the same view, whose targets are stored exactly
    assert step["first_losses"]["cached"] == step["first_losses"]["live"]
    assert runs["live"].keys() == runs["cached"].keys() >= {"all", "data_wait", "teacher", "backward", "read"}
    assert runs["live"]["read"]["median"] == 0.0 < runs["cached"]["read"]["median"]
    # looking entries up takes no teacher's time; the least of one and the most of the other, since this machine may be busy
    assert runs["cached"]["teacher"]["p20"] < runs["live"]["teacher"]["p80"]
    for parts in runs.values():
        # of two rounds the median is the mean, and means may be added
        named = [taken["median"] for part, taken in parts.items() if part not in ("all", "read", "processor")]
        assert 0.0 < sum(named) <= 1.001 * parts["all"]["median"]
        assert parts["processor"]["median"] > 0.0
    assert 0.0 < step["teacher_share"]["p20"] <= step["teacher_share"]["p80"] < 1.0 < step["floor"]["p20"]
    assert step["decode_share"]["p20"] > 0.0 and step["read_share"]["p20"] > 0.0
    writing = result["writing"]
    assert writing["images_in_a_turn"] == 8
    assert writing["write_rate"]["median"] > 0.0 and writing["images_per_s"].keys() == {"bare", "written"}
    assert 0.0 < writing["write_rate, in the loop"]["p20"] < 1.0
    rows = result["reading"]
    orders = ("in order", "random")
    assert [(row["store"], row["order"]) for row in rows] == [(s, o) for s in ("int8", "bf16", "fp32") for o in orders]
    # 8x8 tokens of 48 channels, ten logits and 24 bytes; a scale and a middle for each channel where tokens have 8 bits
    tokens = (8 * 8 * 48 + 4 * 48, 2 * 8 * 8 * 48, 4 * 8 * 8 * 48)
    assert [row["bytes_of_an_entry"] for row in rows[::2]] == [each + 40 + 24 for each in tokens]
    assert all(0.0 < row["of_floor"]["median"] < 1.0 for row in rows)
    for said in ("step, live over cached", "written over bare", "fp32, random", "total loss of the first step"):
        assert said in done.stdout


def test_one_part_alone_and_what_cannot_be_measured(tmp_path):
    done = run(*TINY, "--part", "reading", "--rounds", "1", out=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text()).keys() & {"step", "writing", "reading"} == {"reading"}
    # each is refused before an image is made; libraries may warn of this machine before
    for words, said in (
        (("--pair", "nothing"), "error: pair is 'nothing': it must be one of swin_small-resnet50, "),
        (
            (*TINY, "--rounds", "4"),
            "error: --images is 24 and --views 1: there must be 10 images or more, and their product ",
        ),
    ):
        refused = run(*words, out=tmp_path)
        assert refused.returncode == 2 and refused.stderr.splitlines()[-1].startswith(said), refused.stderr


@pytest.mark.slow
def test_seeds_from_an_exact_cache_are_those_with_the_teacher(tmp_path):
    """The script of several seeds, on images of noise: its two rows are the same runs where tokens are kept in float32."""
    images = make_fashion(tmp_path / "images", train=160, val=40)
    script = ROOT / "benchmarks" / "cached_seeds.py"
    words = ["--data", str(images), "--out", str(tmp_path / "runs"), "--results", str(tmp_path)]
    words += ["--store", "fp32", "--seeds", "2", "--views", "2", "--epochs", "2", "--images", "100"]
    done = forked_with([{"DS_ACCELERATOR": "cpu"}], script, *words)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    live, cached = json.loads((tmp_path / "cached-seeds-fp32.json").read_text())["rows"]
    assert cached["row"] == "fp32 cache" and cached["top1"] == live["top1"] and len(live["top1"]) == 2
    assert cached["difference"] == cached["error"] == 0.0
    assert (tmp_path / "cached-seeds-fp32.md").read_text() in done.stdout
    # finished runs, and the finished cache, are not made again
    results = sorted((tmp_path / "runs").glob("*/results.json"))
    stamps = [path.stat().st_mtime_ns for path in results]
    assert len(stamps) == 5 and forked_with([{"DS_ACCELERATOR": "cpu"}], script, *words).returncode == 0
    assert [path.stat().st_mtime_ns for path in results] == stamps
