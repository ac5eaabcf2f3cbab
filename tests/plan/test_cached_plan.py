"""What a plan says of a teacher cache: its bytes, what making it costs, and from when on it pays."""

import json
from dataclasses import replace
from functools import cache

import pytest
import tiny_run

from scalekd_ds.commands.plan import parser, plan
from scalekd_ds.config import DataConfig, RunConfig, ScheduleConfig
from scalekd_ds.errors import UserError
from scalekd_ds.plan.assumptions import Assumptions
from scalekd_ds.plan.cached import Contents, default_views, plan_cache
from scalekd_ds.plan.cached_report import cache_as_dict, cache_lines
from scalekd_ds.plan.choose import Cluster, make_plan
from scalekd_ds.plan.measure import Measured, from_cache, measure
from scalekd_ds.plan.memory import Layout
from scalekd_ds.plan.throughput import step_time
from scalekd_ds.recipes.command_line import parse_run

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES, GPUS, CLASSES = 10_000, 4, 3
FITTING = [
    *map(str, tiny_run.arguments("none", "none")),
    *("--gpus", "2", "--gpu-memory", "8", "--classes", str(CLASSES), "--train-images", "640"),
]
# a slow GPU for a small model, so that computation, and not latency, decides
SLOW = Assumptions(peak_tflops=0.01, latency_us=0.0, disk_gb_s=1000.0)


@cache
def tiny() -> tuple[RunConfig, Measured]:
    """The command's run, and what it measures of it."""
    cfg, _ = parse_run(parser().parse_known_args(FITTING)[1], "scalekd plan")
    return cfg, measure(cfg, CLASSES, None)


@pytest.fixture
def measured_once(monkeypatch):
    """The command is given what `tiny` measures, on which no option of a cache has an influence."""

    def remembered(cfg, *rest):
        assert (cfg, *rest) == (tiny()[0], CLASSES, None)
        return tiny()[1]

    monkeypatch.setattr("scalekd_ds.plan.measure.measure", remembered)


def planned(assume=SLOW, measured=None, epochs=20.0, views=5, cluster=None):
    """The plan of a cache for a small pair."""
    cfg = replace(tiny()[0], schedule=ScheduleConfig(epochs=epochs))
    measured = measured or tiny()[1]
    contents = Contents(IMAGES, views, measured.targets, "int8", 2)
    return plan_cache(cfg, cluster or Cluster(GPUS, 24.0), CLASSES, assume, "auto", 0, measured, contents)[0]


def said(plan):
    return " ".join(cache_lines(plan, 24.0))


def test_hours_and_gpu_hours_follow_from_the_rates():
    """Making is the teacher's share of a live step; a run is the rest of it."""
    found = planned()
    measured, micro = tiny()[1], found.cached.micro_batch
    live, cached, making = found.live.time, found.cached.time, found.making
    assert cached.teacher == 0.0 < live.teacher
    assert cached.student == pytest.approx(live.student)
    assert (making.placement, making.micro_batch) == ("replica", micro)
    teacher_alone = measured.teacher_flop(micro) / (0.01e12 * 0.35 * micro / (micro + 4.0))
    assert making.images_per_s == pytest.approx(GPUS * micro / teacher_alone, rel=0.02)
    assert making.hours == pytest.approx(5 * IMAGES / making.images_per_s / 3600)
    assert found.live.hours - found.cached.hours == pytest.approx(found.hours_saved)
    # an epoch of the teacher costs what a view of all images does
    assert found.hours_saved / 20 == pytest.approx(making.hours / 5, rel=0.02)
    assert found.pays_after == pytest.approx(5, rel=0.02)


@pytest.mark.parametrize(("views", "run"), [(5, 1), (30, 2), (50, 3)])
def test_it_pays_from_the_run_on_that_earns_the_views_back(views, run):
    """Of 20 epochs each: five views are earned back in a run, 30 in two, 50 in three."""
    found = planned(views=views)
    assert found.pays_from_run == run
    assert 20 * (run - 1) < found.pays_after <= 20 * run
    words = (
        "pays within the first run, after 5 of its 20 epochs"
        if run == 1
        else f"pays from run {run} of this schedule on"
    )
    assert words in said(found)


def test_as_many_views_as_epochs_pay_from_the_second_run_on():
    """Whatever rounding makes of it."""
    found = planned()
    for factor in (0.9999, 1.0001):
        making = replace(found.making, hours=factor * found.hours_saved)
        assert replace(found, making=making).pays_from_run == 2


def test_a_disk_that_is_slower_than_the_teacher_never_pays():
    """A run then takes as long as reading its entries, which the ranks of a node share the disk for."""
    found = planned(replace(SLOW, disk_gb_s=1e-6))
    assert found.cached.images_per_s == pytest.approx(1e-6 * 1e9 / found.contents.entry)
    assert found.making.images_per_s == pytest.approx(found.cached.images_per_s)
    assert found.pays_after is found.pays_from_run is None
    assert found.hours_saved < 0.0
    assert "each run loses" in said(found)
    assert "the cache never pays: a run from it takes no less time, since the disk is slower than the teacher" in said(
        found
    )
    two_nodes = planned(replace(SLOW, disk_gb_s=1e-6), cluster=Cluster(GPUS, 24.0, nodes_of=2))
    assert two_nodes.cached.images_per_s == pytest.approx(2 * found.cached.images_per_s)


def test_reading_beside_a_step_that_takes_longer_costs_nothing():
    measured, layout = from_cache(tiny()[1], 10**6), Layout.of({}, 1, "replica")
    cfg = tiny()[0]
    fast = step_time(measured, cfg, layout, [], 8, 1, replace(SLOW, disk_gb_s=1.0), 8)
    assert fast.reading == 0.0
    slow = step_time(measured, cfg, layout, [], 8, 1, replace(SLOW, disk_gb_s=8e-3 / (2 * fast.total)), 8)
    assert slow.reading == pytest.approx(fast.total)
    assert slow.total == pytest.approx(2 * fast.total)


def test_a_run_that_fits_only_from_a_cache():
    """A teacher of 20 B parameters beside GPUs of 24 GiB: whole, sharded over four, or offloaded in blocks of 30 GB."""
    measured = tiny()[1]
    huge = replace(measured, teacher=replace(measured.teacher, parameters=((2 * 10**10, 2),), block=15 * 10**9))
    found = planned(measured=huge)
    assert found.live is found.making is found.hours_saved is found.pays_after is None
    assert "cannot be made on these GPUs" in said(found)
    assert "with its teacher it fits into no GPU of 24 GiB" in said(found)
    assert json.loads(json.dumps(cache_as_dict(found)))["hours"]["with_teacher"] is None
    # in smaller blocks it is sharded or offloaded
    found = planned(measured=replace(huge, teacher=replace(huge.teacher, block=10**9)))
    assert found.making.placement in ("sharded", "offload")
    assert found.live.hours > found.cached.hours


def test_views_are_as_many_as_a_run_can_use():
    def views(epochs, **data):
        return default_views(RunConfig(data=DataConfig(**data), schedule=ScheduleConfig(epochs=epochs)))

    assert [views(epochs) for epochs in (0.5, 3, 3.5, 100, 300)] == [1, 3, 4, 10, 10]
    assert [views(epochs, mixup=0.8) for epochs in (3, 300)] == [3, 20]
    assert views(300, cutmix=1.0) == 20
    assert views(3, views=7) == 7


def command(*arguments):
    plan([*FITTING, *map(str, arguments)])


def entry_of(token_bytes, channel_bytes):
    """Bytes of an entry with all three logits, its head and its checksum."""
    targets = tiny()[1].targets
    return token_bytes * targets.tokens * targets.dim + channel_bytes * targets.dim + 4 * 3 + 24


@pytest.mark.usefixtures("measured_once")
def test_the_command_prints_what_the_cache_takes_as_json(capsys):
    command("--teacher-cache", "--json", "--views", 7, "--cache-store", "bf16", "--cache-logits", "all")
    result = json.loads(capsys.readouterr().out)
    cache, best, entry = result["teacher_cache"], result["plan"], entry_of(2, 0)
    assert cache["bytes"] == {"entry": entry, "view": 640 * entry, "total": 7 * 640 * entry}
    assert (cache["views"], cache["store"], cache["logits"], cache["images"]) == (7, "bf16", 3, 640)
    assert cache["read_bytes_per_s"]["job"] == pytest.approx(entry * best["images_per_s"])
    assert cache["read_bytes_per_s"]["rank"] == pytest.approx(entry * best["images_per_s"] / 2)
    assert cache["making"]["gpu_hours"] == 2 * cache["making"]["hours"]
    assert cache["hours"]["with_cache"] == best["hours"]
    assert result["flop_per_image"]["teacher"] == best["seconds_per_step"]["teacher"] == 0
    assert result["teacher_bytes"] == tiny()[1].last_stage.bytes


@pytest.mark.usefixtures("measured_once")
def test_the_command_says_what_the_cache_takes(capsys):
    command("--teacher-cache")
    out, entry = " ".join(capsys.readouterr().out.split()), entry_of(1, 4)
    for words in (
        "last stage of the teacher",
        f"teacher cache of 2 views with tokens in int8 and 3 of 3 logits: {entry} B an entry",
        f"{640 * entry / 1e3:.1f} kB a view of 640 images, {2 * 640 * entry / 1e6:.1f} MB on disk",
        "MB/s, of which each rank reads",
        "made in 0.00 h (0.0 GPU hours)",
        "a run from it takes",
    ):
        assert words in out, (words, out)


def test_a_run_that_has_its_cache_already_is_planned_from_it(capsys):
    """Measured anew, as on a user's machine; the folder is not read."""
    command("--teacher_cache", "nowhere", "--json")
    result = json.loads(capsys.readouterr().out)
    assert "teacher_cache" not in result
    assert result["flop_per_image"]["teacher"] == 0
    assert result["teacher_bytes"] == tiny()[1].last_stage.bytes


def test_a_run_that_fits_nowhere_says_that_it_has_a_cache():
    cfg, measured = tiny()
    with pytest.raises(UserError, match=f"{cfg.student} with {cfg.teacher} in a cache fits into no GPU of 2.1 GiB"):
        make_plan(cfg, Cluster(4, 2.1), CLASSES, 1, Assumptions(), measured=from_cache(measured, 1))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--views", 3), "--views is 3, and no teacher cache is planned: add --teacher-cache or leave it out."),
        (("--cache-store", "int8"), "--cache-store is int8, and no teacher cache is planned"),
        (("--cache-logits", "all"), "--cache-logits is all, and no teacher cache is planned"),
        (("--teacher-cache", "--views", 0), "--views is 0: it must be at least 1."),
        (("--teacher-cache", "--views", "few"), "argument --views: invalid int value: 'few'"),
        (("--teacher-cache", "--cache-store", "int4"), "argument --cache-store: invalid choice: 'int4'"),
        (("--teacher-cache", "--cache-logits", 0), "--cache-logits is 0: it must be at least 1, or all."),
        (("--teacher-cache", "--cache-logits", "some"), "--cache-logits is some: it must be at least 1, or all."),
        (("--teacher-cache", "--teacher", "none"), "a teacher cache needs a teacher, and teacher is none"),
        (("--teacher_cache", "x", "--teacher", "none"), "a teacher cache needs a teacher, and teacher is none"),
        (
            ("--teacher-cache", "--distill.tpp", "false"),
            "distill.tpp is false, which needs the teacher's tokens before",
        ),
    ],
)
def test_what_a_user_can_get_wrong(arguments, words):
    with pytest.raises(UserError) as error:
        command(*arguments)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
