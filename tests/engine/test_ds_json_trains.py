"""A DeepSpeed JSON that is accepted runs: every accepted value of every key trains, saves and resumes."""

import json

import pytest
from ds_jsons import AUTOCAST, BESIDE, SAID, TRIED, nested
from forking import forked_ranks
from launching import result_of

from scalekd_ds.engine.ds_check import shown
from scalekd_ds.engine.ds_keys import KEYS, OFFLOAD, PARAM, ZERO

MONITORS = ("tensorboard", "csv_monitor", "wandb", "comet")


def test_every_key_that_is_accepted_is_tried():
    accepted = {key for key in KEYS if not key.startswith(MONITORS)} - {f"{ZERO}.stage", "torch_autocast.dtype"}
    assert accepted == set(TRIED)


def beside(key, stage):
    """What a key needs beside it at a stage, so that it does something."""
    return {k: v for k, v in BESIDE.get(key, {}).items() if stage in KEYS[k].stages}


def cases_of(stage):
    """{what is tried: JSON} at a ZeRO stage: each value of each key that does something there."""
    found = {}
    for key, values in TRIED.items():
        for value in values:
            if stage not in KEYS[key].stages:
                continue
            found[f"{key}={shown(value)}"] = nested({f"{ZERO}.stage": stage} | beside(key, stage) | {key: value})
    return found


def trained(folder, cases):
    path = folder / "cases.json"
    path.write_text(json.dumps({name: {"json": content} for name, content in cases.items()}))
    done = forked_ranks("tests/workers/ds_json_worker.py", path)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return result_of(done)


def check(found, reference, name):
    """The steps of a case are those of the plain JSON, it skips one with a NaN, and it is saved and resumed."""
    assert "error" not in found, f"{name}: {found['error']}\n{found['traceback']}"
    # sums in another order, gradients that are sent in 16 bits, a forward pass in 16 bits
    autocast = "torch_autocast" in name
    tolerance = 0.05 if autocast else 0.02 if "communication_data_type" in name else 1e-4
    assert found["losses"] == pytest.approx(reference["losses"], rel=tolerance), name
    if reference["norm"] is not None and not autocast:
        assert found["norm"] == pytest.approx(reference["norm"], rel=10 * tolerance), name
    assert found["skipped"] == [0, 1] and found["poisoned"] == found["weights"], (
        f"{name}: a step with a NaN on one rank"
    )
    assert found["restored"] == pytest.approx(found["weights"], rel=1e-9), name
    # the step after a resume is the one that came after the save
    assert found["changed"] != found["weights"], name
    assert found["again"] == pytest.approx(found["changed"], rel=1e-3 if autocast else 1e-9), name
    for key, words in SAID.items():
        if name.startswith(f"{key}=") and not name.endswith("=false"):
            assert words in found["said"], name


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_every_accepted_value_alone_trains_saves_and_resumes(tmp_path, stage):
    cases = cases_of(stage)
    assert len(cases) > 25
    found = trained(tmp_path, {"plain": {ZERO: {"stage": stage}}} | cases)
    for name in cases:
        check(found[name], found["plain"], name)


# several keys a run, of which none hides another
TOGETHER = {
    0: [{"prescale_gradients": True, "communication_data_type": "bf16", "wall_clock_breakdown": True}],
    1: [
        {
            "steps_per_print": 1,
            "memory_breakdown": True,
            "disable_python_gc": True,
            f"{ZERO}.contiguous_gradients": False,
            f"{ZERO}.overlap_comm": True,
            f"{ZERO}.reduce_bucket_size": 1,
            f"{ZERO}.allgather_bucket_size": 2,
            f"{ZERO}.parameter_alignment": True,
            f"{OFFLOAD}.device": "cpu",
        }
    ],
    2: [
        {
            "gradient_predivide_factor": 3.0,
            "communication_data_type": "fp16",
            "flops_profiler.enabled": True,
            "flops_profiler.profile_step": 2,
            f"{ZERO}.reduce_scatter": False,
            f"{ZERO}.round_robin_gradients": True,
            f"{ZERO}.use_multi_rank_bucket_allreduce": False,
        },
        {"torch_autocast": AUTOCAST, f"{OFFLOAD}.device": "cpu", f"{OFFLOAD}.pin_memory": False},
    ],
    3: [
        {
            f"{ZERO}.reduce_scatter": False,
            f"{ZERO}.sub_group_size": 1,
            f"{ZERO}.stage3_param_persistence_threshold": 0,
            f"{ZERO}.stage3_max_live_parameters": 0,
            f"{ZERO}.stage3_max_reuse_distance": 0,
            f"{ZERO}.stage3_prefetch_bucket_size": 0,
            f"{ZERO}.stage3_use_all_reduce_for_fetch_params": True,
            f"{ZERO}.memory_efficient_linear": False,
            f"{ZERO}.enable_sanity_checks": True,
            f"{ZERO}.log_trace_cache_warnings": True,
        },
        {
            f"{ZERO}.stage3_allgather_sequential": True,
            f"{ZERO}.stage3_module_granularity_threshold": 1000,
            f"{OFFLOAD}.device": "cpu",
            f"{PARAM}.device": "cpu",
        },
    ],
}


def test_accepted_keys_together_train_save_and_resume(tmp_path):
    """Of the slow sweep a short version; where a run fails its keys are tried one by one, to name the one at fault."""
    cases, plain = {}, {}
    for stage, groups in TOGETHER.items():
        plain[f"plain {stage}"] = {ZERO: {"stage": stage}}
        for group in groups:
            cases[f"stage {stage}: {', '.join(group)}"] = stage, group
    jsons = {name: nested({f"{ZERO}.stage": stage} | group) for name, (stage, group) in cases.items()}
    found = trained(tmp_path, plain | jsons)
    for name, (stage, group) in cases.items():
        try:
            check(found[name], found[f"plain {stage}"], name)
        except AssertionError:
            alone = {
                f"{key}={shown(value)}": nested({f"{ZERO}.stage": stage} | BESIDE.get(key, {}) | {key: value})
                for key, value in group.items()
            }
            singly = trained(tmp_path, alone)
            for key in alone:
                check(singly[key], found[f"plain {stage}"], key)
            raise
