"""The choice of a plan, and the command that prints it."""

import importlib
import json
import math
import re
import sys
from dataclasses import replace
from functools import cache

import pytest
import tiny_run
import torch
from forking import forked
from launching import ROOT
from plan_cases import config_of

from scalekd_ds.commands.plan import plan
from scalekd_ds.config import EmaConfig
from scalekd_ds.engine import ds_config
from scalekd_ds.errors import UserError
from scalekd_ds.plan.assumptions import Assumptions
from scalekd_ds.plan.cached import Contents, default_views, plan_cache
from scalekd_ds.plan.cached_report import cache_lines
from scalekd_ds.plan.choose import GIB, Cluster, largest_micro_batch, make_plan
from scalekd_ds.plan.communication import Collective
from scalekd_ds.plan.measure import Curve, build_on_meta, measure
from scalekd_ds.plan.memory import Layout, memory_parts
from scalekd_ds.plan.throughput import step_time
from scalekd_ds.recipes import RECIPES
from scalekd_ds.teacher_cache.sizes import STORES, TOP_LOGITS

pytestmark = pytest.mark.usefixtures("one_thread")


def test_seconds_follow_from_the_assumptions():
    """A hand-made step: rates, a ring's bytes, a tree's latency, what hides, and the slowest of 16 ranks."""
    _, measured = swin_l()
    cfg, layout = config_of("sgd"), Layout.of({"zero_optimization": {"stage": 1}}, 16, "replica")
    assume = Assumptions(
        peak_tflops=1.0,
        mfu=0.5,
        half_batch=2.0,
        inter_gb_s=1.0,
        latency_us=100.0,
        overlap=0.5,
        jitter=0.1,
        memory_gb_s=1.0,
    )
    measured = replace(measured, teacher_flop=Curve(((1, 10**9), (2, 2 * 10**9))), student_flop=Curve(((1, 0), (2, 0))))
    sent = [
        Collective("a", "all_reduce", 8 * 10**6, 2, False),
        Collective("b", "all_gather", 4 * 10**6, 0, True),
        Collective("c", "host_to_device", 0, 0, True),
    ]
    step = step_time(measured, cfg, layout, sent, 2, 3, assume, 8)
    # half of the rate at two images
    assert step.teacher == pytest.approx(3 * 2e9 / 0.25e12)
    assert step.waiting == pytest.approx(0.1 * math.sqrt(2 * math.log(16)) * step.teacher)
    reduce, gather = 2 * 15 / 16 * 8e-3 + 2 * 4 * 100e-6, 15 / 16 * 4e-3
    assert step.communication == pytest.approx(reduce + gather / 2)
    assert step.optimizer == pytest.approx(4 * measured.numel / 16 * 5 / 1e9)
    inside = step_time(measured, cfg, replace(layout, world_size=8), sent[:1], 2, 3, assume, 8)
    assert inside.communication == pytest.approx(2 * 7 / 8 * 8e-3 / 200 + 2 * 3 * 100e-6)


@pytest.mark.parametrize("stage", range(4))
def test_the_largest_micro_batch_is_the_largest(stage):
    cfg, measured = swin_l()
    layout = Layout.of({"zero_optimization": {"stage": stage}}, 8, "replica")
    room = 24 * GIB
    largest = largest_micro_batch(measured, cfg, layout, room)
    totals = [sum(memory_parts(measured, cfg, layout, images).values()) for images in (largest, largest + 1)]
    assert largest > 1 and totals[0] <= room < totals[1]


def test_the_moving_average_and_the_loader_are_counted():
    (plain, measured), layout = swin_l(), Layout.of({"zero_optimization": {"stage": 2}}, 4, "replica")
    cfg = replace(plain, ema=EmaConfig(decay=0.99))
    parts = memory_parts(measured, cfg, layout, 6)
    student = sum(p.numel for p in measured.parameters if p.of_student)
    assert student == sum(p.numel() for p in build_on_meta(cfg, 1000).student.parameters())
    assert parts["average"] == 4 * math.ceil(student / 4)
    assert parts["images"] == 2 * 6 * 3 * 224 * 224 * 4


@cache
def swin_l():
    cfg = RECIPES["swin_l-resnet50-traditional"]()
    return cfg, measure(cfg, 1000, torch.bfloat16)


@pytest.fixture
def measured_once(monkeypatch):
    """The command is given what `swin_l` measures, on which neither the batch of all GPUs nor their number has an influence."""
    measure_now = measure

    def measure_or_remember(cfg, *rest):
        known, measured = swin_l()
        same = replace(cfg, global_batch_size=known.global_batch_size) == known and rest == (1000, torch.bfloat16)
        return measured if same else measure_now(cfg, *rest)

    monkeypatch.setattr("scalekd_ds.plan.measure.measure", measure_or_remember)


def test_the_simplest_plan_within_the_margin_is_taken():
    """With plenty of memory the teacher is a replica; where one does not fit, it is sharded."""
    cfg, measured = swin_l()
    best, plans = make_plan(cfg, Cluster(8, 80.0), 1000, 1_281_167, Assumptions(), measured=measured)
    assert best.layout.placement == "replica" and best.micro_batch == 32 and best.accumulation == 1
    assert len(plans) == 12
    assert best.images_per_s * 1.05 >= max(plan.images_per_s for plan in plans)
    assert best.hours == pytest.approx(100 * 1_281_167 / best.images_per_s / 3600)
    huge = replace(measured, teacher=replace(measured.teacher, parameters=((2 * 10**10, 2),), block=10**8))
    best, _ = make_plan(cfg, Cluster(8, 24.0), 1000, 1_281_167, Assumptions(), measured=huge)
    assert best.layout.placement == "sharded"
    assert all(sum(plan.memory.values()) <= plan.room for plan in plans)


def test_a_pair_that_fits_nowhere_names_the_memory_that_would_do():
    cfg, measured = swin_l()
    with pytest.raises(UserError) as error:
        make_plan(cfg, Cluster(8, 3.0), 1000, 1, Assumptions(), measured=measured)
    needed = float(str(error.value).split("it takes ")[1].split(" GiB")[0])
    make_plan(cfg, Cluster(8, needed + 0.06), 1000, 1, Assumptions(), measured=measured)
    with pytest.raises(UserError):
        make_plan(cfg, Cluster(8, needed - 0.06), 1000, 1, Assumptions(), measured=measured)


def command(*arguments):
    plan([*map(str, arguments)])


FITTING = ("--recipe", "swin_l-resnet50-traditional", "--gpus", 16, "--gpu-memory", 24)


@pytest.mark.usefixtures("measured_once")
def test_the_command_prints_tables(capsys):
    command(*FITTING, "--global_batch_size", 512)
    out = capsys.readouterr().out
    for word in (
        "take --run.ds_config zero",
        "parameters",
        "activations",
        "teacher",
        "reduce",
        "images/s",
        "mfu 0.35",
    ):
        assert word in out, word


@pytest.mark.usefixtures("measured_once")
@pytest.mark.parametrize("batch", [694, 696])
def test_a_share_without_divisors_is_said(batch, capsys):
    """694 images on two GPUs are 347 each, a prime number and more than fit, so that a micro batch has one of them."""
    command(*FITTING, "--gpus", 2, "--global_batch_size", batch)
    said = " ".join(capsys.readouterr().out.split())
    words = "a GPU's 347 of the 694 images have no divisor above 1 up to 2"
    assert (words in said) == (batch == 694), said


def test_classes_and_images_are_those_of_the_data_where_it_is_here(tmp_path, capsys):
    root = tiny_run.images(tmp_path / "images")
    # a teacher of as many classes: logit KD takes no other
    more = tiny_run.arguments(
        root, tmp_path / "run", "--data.train_images", 30, "--gpus", 1, "--gpu-memory", 8, "--json"
    )
    command(*more)
    few = json.loads(capsys.readouterr().out)["plan"]
    command(*more, "--classes", 3, "--train-images", 60)
    many = json.loads(capsys.readouterr().out)["plan"]
    assert few["memory"] == many["memory"]
    assert 2 * few["hours"] == pytest.approx(many["hours"])


# measured anew, as on a user's machine
def test_the_command_prints_json(capsys):
    arguments = ("--json", "--stage", 2, "--teacher-placement", "sharded", "--assume.mfu", 0.2, "--train-images", 1000)
    command(*FITTING, *arguments)
    result = json.loads(capsys.readouterr().out)
    plan = result["plan"]
    assert (plan["zero_stage"], plan["teacher_placement"], result["assumptions"]["mfu"]) == (2, "sharded", 0.2)
    assert plan["memory"]["total"] == sum(v for k, v in plan["memory"].items() if k != "total") <= plan["room"]
    assert plan["micro_batch_size"] * plan["gradient_accumulation_steps"] * 16 == 256
    assert plan["hours"] == pytest.approx(100 * 1000 / plan["images_per_s"] / 3600)
    assert [row["zero_stage"] for row in result["fits"]] == [2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--recipe", "swin_x", *FITTING[2:]), "unknown recipe 'swin_x'."),
        ((*FITTING, "--gpus", 0), "--gpus is 0: it must be at least 1"),
        ((*FITTING, "--gpus", 12), "global_batch_size is 256, which 12 ranks cannot share evenly"),
        ((*FITTING, "--gpus", "many"), "argument --gpus: invalid int value: 'many'"),
        ((*FITTING, "--gpu-memory", -1), "--gpu-memory is -1.0: it must be positive"),
        ((*FITTING, "--gpu-memory", "nan"), "--gpu-memory is nan: it must be positive"),
        ((*FITTING, "--nodes-of", 0), "--nodes-of is 0"),
        ((*FITTING, "--classes", 0), "--classes is 0"),
        ((*FITTING, "--assume.mfu", 0), "assume.mfu is 0.0: it must be positive"),
        ((*FITTING, "--assume.overlap", 1.5), "assume.overlap is 1.5: it must be not negative and below 1"),
        ((*FITTING, "--optim.lrr", 1), "unknown argument '--optim.lrr'"),
        (FITTING[2:], "no --recipe is given"),
    ],
)
def test_what_a_user_can_get_wrong(arguments, words):
    with pytest.raises(UserError, match=words.replace("(", r"\(").replace(".", r"\.")) as error:
        command(*arguments)
    assert "\n" not in str(error.value)


def test_a_mistake_is_one_line_and_a_status():
    done = forked("launch/plan.py", "--recipe", "fashion-ce", "--gpus", 16, "--gpu-memory", 2)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert "fits into no GPU of 2 GiB" in line and "on 16 GPUs" in line


def test_stages_that_are_planned_are_the_ones_that_are_shipped():
    for stage in range(4):
        assert ds_config.stage_of(ds_config.read(f"zero{stage}")) == stage


@pytest.fixture(scope="module")
def scaling():
    """benchmarks/scaling.py, which measures each run once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        module, known = importlib.import_module("scaling"), {}
        measure_now = module.measure

        def measure_or_remember(cfg, *rest):
            return known[repr(cfg)] if repr(cfg) in known else known.setdefault(repr(cfg), measure_now(cfg, *rest))

        patch.setattr(module, "measure", measure_or_remember)
        yield module


def test_the_table_of_plans_in_the_documents_is_what_the_command_prints(scaling, monkeypatch, capsys):
    """Layouts and gigabytes to the digit; rates within 2%, since releases of torch count a few operations otherwise."""
    monkeypatch.setattr(sys, "argv", ["benchmarks/scaling.py", "--table"])
    scaling.main()

    def rows(text):
        return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]

    printed, document = rows(capsys.readouterr().out), rows((ROOT / "docs" / "planning.md").read_text())
    start = document.index(printed[0])
    for ours, theirs in zip(printed, document[start:], strict=False):
        assert ours[:-2] == theirs[:-2]
        if ours[-1].isdigit():
            assert [float(cell) for cell in ours[-2:]] == pytest.approx([float(c) for c in theirs[-2:]], rel=0.02)
    assert len(printed) == 11


@pytest.mark.parametrize(("teacher", "memory"), [("swin_l", 40.0), ("dinov3", 24.0)])
def test_the_caches_in_the_documents_are_what_the_command_says(scaling, teacher, memory):
    """The words, and the numbers within 2% or the last digit."""
    cfg, measured = swin_l() if teacher == "swin_l" else (scaling.huge_teacher(), None)
    measured, cluster = measured or scaling.measure(cfg, 1000, torch.bfloat16), Cluster(8, memory)
    contents = Contents(scaling.IMAGENET, default_views(cfg), measured.targets, STORES[0], TOP_LOGITS)
    found, _ = plan_cache(cfg, cluster, 1000, Assumptions(), "auto", None, measured, contents)
    said = " ".join(cache_lines(found, memory))
    texts = re.findall(r"```text\n(teacher cache of .*?)```", (ROOT / "docs" / "planning.md").read_text(), re.DOTALL)
    document = " ".join(texts[0 if teacher == "swin_l" else 1].split())
    number = re.compile(r"\d[\d,]*(?:\.\d+)?")
    assert number.sub("N", document) == number.sub("N", said), said
    ours, theirs = ([float(n.replace(",", "")) for n in number.findall(text)] for text in (said, document))
    assert ours == pytest.approx(theirs, rel=0.02, abs=0.11)
