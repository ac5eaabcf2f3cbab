"""A run from a cache takes the steps of a run with its teacher, bit for bit, whatever ranks, ZeRO stage and resume."""

import json

import pytest
import tiny_run
from cache_jobs import cached, caching, live, run_all
from safetensors.torch import load_file

LOSSES = {f"loss/{term}" for term in (*tiny_run.TERMS, "total")}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_run.images(tmp_path_factory.mktemp("images") / "data")


def assert_equal_runs(first, second):
    a, b = tiny_run.scalars(first), tiny_run.scalars(second)
    names = {name for name in a if name.startswith("loss/")}
    assert names == {name for name in b if name.startswith("loss/")} == LOSSES
    for name in names:
        assert a[name] == b[name], name
    weights, others = load_file(first / "student.safetensors"), load_file(second / "student.safetensors")
    # a checkpoint gives each rank the ranks' mean of BatchNorm's statistics, which no step reads
    assert all((weights[name] == others[name]).all() for name in weights if "running_" not in name)
    return a


def test_a_run_from_a_cache_is_the_run_with_its_teacher_on_two_ranks_and_resumed(data, tmp_path):
    cache, resumed, crossed = (tmp_path / name for name in ("cache", "resumed", "crossed"))
    zero = ("--run.ds_config", "cpu_fp32")
    done = run_all(
        tmp_path,
        [
            caching(data, cache, 3),
            live(data, tmp_path / "live", 3, *zero),
            cached(data, tmp_path / "cached", cache, *zero),
            # in the middle of the second epoch
            cached(data, resumed, cache, *zero, "--run.stop_after", 5),
            cached(data, resumed, cache, *zero, "--run.resume", "auto"),
            # and a run that was begun with its teacher
            live(data, crossed, 3, *zero, "--run.stop_after", 5),
            cached(data, crossed, cache, *zero, "--run.resume", "auto"),
        ],
        ranks=2,
    )
    assert f"{cache} is complete: 3 views of 40 images" in done.stdout
    logged = assert_equal_runs(tmp_path / "live", tmp_path / "cached")
    assert len(logged["loss/total"]) == 14
    assert_equal_runs(tmp_path / "live", resumed)
    assert_equal_runs(tmp_path / "live", crossed)
    found = tiny_run.scalars(tmp_path / "cached")
    assert found["cache/read_s"].keys() == found["loss/total"].keys()
    # in threads beside the step: on a machine that does much else it has no upper bound
    assert all(share > 0 for share in found["cache/share_of_step"].values())
    # pass 0, 1, 2 and then 0 again, as the last batch of this rank has it
    assert set(found["cache/view"].values()) == {0.0, 1.0, 2.0}
    assert set(found["cache/damaged_entries"].values()) == {0.0}
    # nobody asks a teacher without its trunk how accurate it is
    both = [tiny_run.scalars(tmp_path / name) for name in ("live", "cached")]
    assert both[0].keys() - both[1].keys() == {"val/teacher_top1", "val/teacher_top5"}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_hundred_steps_at_every_zero_stage(data, tmp_path, ranks):
    cache, more = tmp_path / "cache", ("--schedule.epochs", 30)
    jobs = [caching(data, cache, 30)]
    for stage in (0, 1, 2, 3):
        config = tmp_path / f"zero{stage}.json"
        # as cpu_fp32, at another stage
        config.write_text(json.dumps(json_of(stage)))
        zero = (*more, "--run.ds_config", config)
        resumed = tmp_path / f"resumed{stage}"
        jobs += [
            live(data, tmp_path / f"live{stage}", 30, *zero),
            cached(data, resumed, cache, *zero, "--run.stop_after", 51),
            cached(data, resumed, cache, *zero, "--run.resume", "auto"),
        ]
    run_all(tmp_path, jobs, ranks)
    for stage in (0, 1, 2, 3):
        logged = assert_equal_runs(tmp_path / f"live{stage}", tmp_path / f"resumed{stage}")
        assert len(logged["loss/total"]) == 100


def json_of(stage):
    from scalekd_ds.engine import ds_config

    config = ds_config.read("cpu_fp32")
    config["zero_optimization"] = dict(config.get("zero_optimization", {}), stage=stage)
    return config


def test_eight_bits_change_the_terms_of_a_step_by_less_than_a_thousandth(data, tmp_path):
    """The first step alone: weights that were trained on other targets go other ways."""
    one = ("--schedule.epochs", 0.3)
    run_all(
        tmp_path,
        [
            caching(data, tmp_path / "int8", 1, store="int8", logits=64),
            caching(data, tmp_path / "bf16", 1, store="bf16", logits=2),
            live(data, tmp_path / "live", 1, *one),
            cached(data, tmp_path / "from_int8", tmp_path / "int8", *one),
            # the tokens of random weights hardly vary over the grid, which bfloat16 keeps less of than 8 scaled bits do
            cached(data, tmp_path / "from_bf16", tmp_path / "bf16", *one, "--run.teacher_gate_frequency", 0.01),
        ],
        ranks=1,
    )
    exact = tiny_run.scalars(tmp_path / "live")
    for run in ("from_int8", "from_bf16"):
        found = tiny_run.scalars(tmp_path / run)
        for name in LOSSES:
            assert found[name][1] == pytest.approx(exact[name][1], rel=1e-3), (run, name)
