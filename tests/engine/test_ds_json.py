"""A DeepSpeed JSON that is accepted runs: every key that the installed DeepSpeed reads trains, or is refused by its name."""

import json
import re

import pytest
from forking import forked_ranks
from launching import result_of

from scalekd_ds.config import RunConfig
from scalekd_ds.engine import ds_config
from scalekd_ds.engine.ds_check import shown
from scalekd_ds.engine.ds_keys import KEYS, OFFLOAD, PARAM, REFUSED, SECTIONS, SWITCHED_OFF, ZERO
from scalekd_ds.errors import UserError

deepspeed_config = pytest.importorskip("deepspeed.runtime.config")
AUTOCAST = {"enabled": True, "dtype": "bfloat16"}
MONITORS = ("tensorboard", "csv_monitor", "wandb", "comet")
# values of every key with which a run trains, and the JSON beside them
TRIED = {
    "torch_autocast.enabled": [False],
    "torch_autocast.lower_precision_safe_modules": [["torch.nn.Linear", "torch.nn.modules.conv.Conv2d"]],
    "communication_data_type": ["fp32", "bf16", "fp16"],
    "prescale_gradients": [True, False],
    "gradient_predivide_factor": [2, 3.0],
    "gradient_allreduce_op": ["mean"],
    "steps_per_print": [1],
    "wall_clock_breakdown": [True],
    "memory_breakdown": [True],
    "dump_state": [True],
    "disable_python_gc": [True],
    "log_level": ["info", "error"],
    "timers.throughput.enabled": [False],
    "timers.throughput.synchronized": [False],
    "zero_allow_untested_optimizer": [True],
    "zero_force_ds_cpu_optimizer": [False],
    "flops_profiler.enabled": [True],
    "flops_profiler.profile_step": [2],
    "flops_profiler.module_depth": [1],
    "flops_profiler.top_modules": [2],
    "flops_profiler.detailed": [False],
    "flops_profiler.output_file": ["/dev/null"],
    "flops_profiler.recompute_fwd_factor": [0.0],
    f"{ZERO}.contiguous_gradients": [True, False],
    f"{ZERO}.reduce_scatter": [True, False],
    f"{ZERO}.reduce_bucket_size": [1, 1e6],
    f"{ZERO}.use_multi_rank_bucket_allreduce": [False],
    f"{ZERO}.allgather_partitions": [True],
    f"{ZERO}.allgather_bucket_size": [2, 5e8],
    f"{ZERO}.overlap_comm": [True, False],
    f"{ZERO}.compute_grad_norm": [True],
    f"{ZERO}.round_robin_gradients": [True],
    f"{ZERO}.parameter_alignment": [True],
    f"{ZERO}.ignore_unused_parameters": [True],
    f"{ZERO}.sub_group_size": [1, 1e9],
    f"{ZERO}.memory_efficient_linear": [True, False],
    f"{ZERO}.override_module_apply": [True],
    f"{ZERO}.log_trace_cache_warnings": [True],
    f"{ZERO}.enable_sanity_checks": [True],
    f"{ZERO}.load_from_fp32_weights": [True],
    f"{ZERO}.elastic_checkpoint": [False],
    f"{ZERO}.pipeline_loading_checkpoint": [False],
    f"{ZERO}.legacy_stage1": [False],
    f"{ZERO}.zero_hpz_partition_size": [1],
    f"{ZERO}.zero_quantized_weights": [False],
    f"{ZERO}.zero_quantized_nontrainable_weights": [False],
    f"{ZERO}.zero_quantized_gradients": [False],
    f"{ZERO}.save_muon_momentum_buffer_in_memory": [False],
    f"{OFFLOAD}.device": ["cpu", "none"],
    f"{OFFLOAD}.pin_memory": [False],
    f"{OFFLOAD}.ratio": [1.0],
    f"{OFFLOAD}.super_offload": [False],
    f"{PARAM}.device": ["cpu", "none"],
    f"{PARAM}.pin_memory": [False],
}
STAGE3 = {
    "prefetch_bucket_size": [0, 5e7],
    "param_persistence_threshold": [0],
    "model_persistence_threshold": [0],
    "max_live_parameters": [0],
    "max_reuse_distance": [0],
    "module_granularity_threshold": [1000],
    "use_all_reduce_for_fetch_params": [True],
    "allgather_sequential": [True],
    "gather_16bit_weights_on_model_save": [False],
}
for _name, _values in STAGE3.items():
    TRIED[f"{ZERO}.stage3_{_name}"] = TRIED[f"{ZERO}.{_name}"] = _values
BESIDE = {
    "torch_autocast.lower_precision_safe_modules": {"torch_autocast.enabled": True},
    "dump_state": {"log_level": "info"},
    "prescale_gradients": {f"{ZERO}.reduce_scatter": False},
    "gradient_predivide_factor": {f"{ZERO}.reduce_scatter": False},
    f"{OFFLOAD}.pin_memory": {f"{OFFLOAD}.device": "cpu"},
    f"{OFFLOAD}.ratio": {f"{OFFLOAD}.device": "cpu"},
    f"{PARAM}.pin_memory": {f"{PARAM}.device": "cpu"},
    **{key: {"flops_profiler.enabled": True} for key in TRIED if key.startswith("flops_profiler.")},
}
# what a key that reports makes DeepSpeed say
SAID = {
    "wall_clock_breakdown": "time (ms)",
    "memory_breakdown": "Max_MA",
    "flops_profiler.enabled": "DeepSpeed Flops Profiler",
    "flops_profiler.profile_step": "Profile Summary at step 3",
    "flops_profiler.top_modules": "Top 2 modules",
}


def nested(flat):
    """{"a.b": 1} as {"a": {"b": 1}}."""
    found = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        place = found
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return found


def write(folder, content):
    path = folder / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def refusal(folder, content):
    """The one line with which a JSON is refused."""
    with pytest.raises(UserError) as error:
        ds_config.read(write(folder, content))
    text = str(error.value)
    assert "\n" not in text and len(text) < 600, text
    return text


class Recorder(dict):
    """A part of a JSON that notes which keys DeepSpeed asks for."""

    def __init__(self, seen, prefix="", content=()):
        super().__init__(content)
        self.seen, self.prefix = seen, prefix

    def _note(self, key):
        self.seen.add(self.prefix + str(key))

    def get(self, key, default=None):
        self._note(key)
        return super().get(key, default)

    def __getitem__(self, key):
        self._note(key)
        return super().__getitem__(key)

    def __contains__(self, key):
        self._note(key)
        return super().__contains__(key)

    def keys(self):
        return self

    def __copy__(self):
        return self


def keys_of_models():
    """The fields of DeepSpeed's typed sections, by both of their names."""
    from deepspeed.monitor import config as monitor
    from deepspeed.runtime.zero import config as zero
    from deepspeed.runtime.zero import offload_config as offload
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    models = {
        ZERO: zero.DeepSpeedZeroConfig,
        OFFLOAD: offload.DeepSpeedZeroOffloadOptimizerConfig,
        PARAM: offload.DeepSpeedZeroOffloadParamConfig,
        "timers.throughput": DeepSpeedThroughputTimerConfig,
        "tensorboard": monitor.TensorBoardConfig,
        "csv_monitor": monitor.CSVConfig,
        "wandb": monitor.WandbConfig,
        "comet": monitor.CometConfig,
    }
    return {
        f"{section}.{name}"
        for section, model in models.items()
        for field, info in model.model_fields.items()
        for name in (field, info.alias or field)
    }


def keys_that_deepspeed_reads():
    """Dotted keys: what `DeepSpeedConfig` asks of a JSON, and the fields of its typed sections."""
    seen = set()
    sections = {
        name: Recorder(seen, f"{name}.")
        for name in (
            "torch_autocast",
            "flops_profiler",
            "checkpoint",
            "data_types",
            "activation_checkpointing",
            "timers",
        )
    }
    deepspeed_config.DeepSpeedConfig(Recorder(seen, "", {"train_micro_batch_size_per_gpu": 1} | sections))
    return seen | keys_of_models()


def decided(key):
    parts = key.split(".")
    prefixes = {".".join(parts[: n + 1]) for n in range(len(parts))}
    whole = set(KEYS) | set(SECTIONS) | set(ds_config.FROM_RECIPE)
    removed = {*deepspeed_config._REMOVED_TOP_LEVEL_CONFIG_KEYS}
    removed |= {f"{ZERO}.{name}" for name in deepspeed_config._REMOVED_ZERO_CONFIG_KEYS}
    return key in whole or bool(prefixes & (set(REFUSED) | set(SWITCHED_OFF) | removed))


def test_every_key_that_the_installed_deepspeed_reads_is_decided():
    found = keys_that_deepspeed_reads()
    assert len(found) > 130
    assert sorted(key for key in found if not decided(key)) == []


def test_no_key_is_decided_that_deepspeed_does_not_read():
    found = keys_that_deepspeed_reads()
    assert sorted(key for key in KEYS if key not in found) == []


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


NONSENSE = [None, "", "x", "true", "1e8", -1, 0.5, -0.5, 1e300, 10**30, [], {}, [1], {"x": 1}, True, 0, 7]


@pytest.mark.parametrize("key", sorted(KEYS))
def test_a_nonsense_value_is_refused_by_its_key_or_deepspeed_can_read_it(tmp_path, key):
    """Seventeen values for each of a hundred keys, at the first ZeRO stage at which the key does something."""
    refused = 0
    for value in NONSENSE:
        stage = {} if key == f"{ZERO}.stage" else {f"{ZERO}.stage": KEYS[key].stages[-1]}
        path = write(tmp_path, nested(stage | BESIDE.get(key, {}) | {key: value}))
        try:
            config = ds_config.read(path)
        except UserError as error:
            assert key in str(error) and "\n" not in str(error), error
            refused += 1
            continue
        assert KEYS[key].fits(value), value
        deepspeed_config.DeepSpeedConfig(
            ds_config.merge(config, RunConfig(), 1) | {"train_micro_batch_size_per_gpu": 1}
        )
    # text takes text, numbers take numbers, flags take flags
    assert refused >= 10


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_what_has_no_place_in_a_run_is_refused_by_name(tmp_path, key):
    for value in (True, {"enabled": True}, "auto", None, 1):
        assert f"{key} " in refusal(tmp_path, nested({f"{ZERO}.stage": 3} | {key: value}))


def test_what_deepspeed_removed_is_refused_by_name(tmp_path):
    removed = {*deepspeed_config._REMOVED_TOP_LEVEL_CONFIG_KEYS}
    removed |= {f"{ZERO}.{name}" for name in deepspeed_config._REMOVED_ZERO_CONFIG_KEYS}
    assert len(removed) > 10
    for key in removed:
        assert f"{key} " in refusal(tmp_path, nested({key: {"enabled": False}}))


@pytest.mark.parametrize("key", sorted(SWITCHED_OFF))
def test_sections_may_be_off_and_nothing_else(tmp_path, key):
    for section in ({}, {"enabled": False}, {"enabled": False, "loss_scale": 0}):
        assert key not in ds_config.read(write(tmp_path, {key: section}))
    for section in (
        {"enabled": True},
        {"enabled": "auto"},
        {"enabled": "true"},
        {"enabled": 1},
        True,
        None,
        [],
        "auto",
    ):
        assert key in refusal(tmp_path, {key: section})


def test_a_key_is_refused_at_stages_where_it_does_nothing(tmp_path):
    tried = 0
    for key, rule in KEYS.items():
        for stage in set(range(4)) - set(rule.stages):
            value = next(v for v in TRIED[key] if v != rule.idle)
            text = refusal(tmp_path, nested({f"{ZERO}.stage": stage, key: value}))
            assert f"{key} has no effect at ZeRO stage {stage}" in text
            tried += 1
            if rule.idle is not None:
                ds_config.read(write(tmp_path, nested({f"{ZERO}.stage": stage, key: rule.idle})))
    assert tried > 60


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"bf16": {"enabled": True}, ZERO: {"stage": 2}}, 'bf16.enabled is true: it must be false.* "torch_autocast"'),
        ({"fp16": {"enabled": "auto", "loss_scale": 0}}, 'fp16.enabled is "auto"'),
        (
            {"torch_autocast": {"enabled": True, "dtype": "float16"}},
            "torch_autocast.dtype is .*float16 needs a loss scale",
        ),
        ({"torch_autocast": {"enabled": "auto"}}, 'torch_autocast.enabled is "auto"'),
        ({"amp": {"enabled": True}}, 'amp has no place in a run.* "torch_autocast"'),
        ({ZERO: {"stage": "auto"}}, 'zero_optimization.stage is "auto"'),
        ({ZERO: True}, "zero_optimization is true: it must be an object"),
        ({ZERO: {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/tmp"}}}, "offload_param"),
        (
            {ZERO: {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            "offload_optimizer.device is .*nvme.*from NVMe",
        ),
        (
            {ZERO: {"stage": 3, "offload_optimizer": {"devise": "cpu"}}},
            "offload_optimizer.devise'. Did you mean 'device'",
        ),
        ({ZERO: {"stage": 2, "offload_optimizer": "cpu"}}, 'offload_optimizer is "cpu": it must be an object'),
        ({ZERO: {"stage": 1, "offload_optimizer": None}}, "offload_optimizer is null"),
        ({ZERO: {"stage": 2, "prefetch_bucket_size": 1}}, "has no effect at ZeRO stage 2, only at 3"),
        ({ZERO: {"stage": 3, "prefetch_bucket_size": 1, "stage3_prefetch_bucket_size": 1}}, "the same: keep one"),
        ({ZERO: {"stage": 3, "allgather_sequential": True, "prefetch_bucket_size": 9}}, "fetches parameters singly"),
        ({ZERO: {"stage": 1, "allgather_bucket_size": 3}}, "must be an even number"),
        ({ZERO: {"stage": 1}, "prescale_gradients": True}, 'without "reduce_scatter": false'),
        ({"prescale_gradients": True, "gradient_predivide_factor": 2}, "beside prescale_gradients"),
        ({"torch_autocast": AUTOCAST, ZERO: {"stage": 1}, "communication_data_type": "fp32"}, "beside torch_autocast"),
        ({"dump_state": True}, 'without "log_level": "info"'),
        ({"gradient_allreduce_op": "sum"}, "learning rate"),
        (
            {"flops_profiler": {"output_file": "/proc/version/x"}},
            "output_file is .* must be a file that can be written",
        ),
        ({"flops_profiler": {"output_file": "x" * 5000}}, "output_file is .* must be a file that can be written"),
        ({"flops_profiler": {"output_file": "/tmp"}}, "output_file is .* must be a file that can be written"),
        ({"torch_autocast": {"enabled": True, "lower_precision_safe_modules": ["torch.nn.Linea"]}}, "safe_modules"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}, "sets 'optimizer', which is the recipe's"),
        ('{"seed": 1, "seed": 2}', "the key 'seed' twice"),
        ('{"zero_optimization": {"stage": 1, "stage": 2}}', "the key 'stage' twice"),
        ('{"steps_per_print": NaN}', "steps_per_print is NaN"),
        ('{"gradient_predivide_factor": Infinity}', "gradient_predivide_factor is Infinity"),
        ("[" * 100_000, "is not JSON"),
        ('{"steps_per_print": 1} // mine', "is not JSON"),
        ("\udcff".encode("utf-8", "surrogateescape").decode("latin-1"), "is not JSON"),
    ],
)
def test_what_people_write_is_refused_with_what_to_write_instead(tmp_path, content, words):
    assert re.search(words, refusal(tmp_path, content))


@pytest.mark.parametrize("name", ["", "nowhere.json", "/", "zero9", "x" * 5000, "a\0b", '{"zero_optimization": {}}'])
def test_a_name_that_is_no_file_is_refused(name):
    with pytest.raises(UserError, match="is neither a file nor in ds_configs"):
        ds_config.read(name)


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    path = write(tmp_path, {})

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_text", refuse)
    with pytest.raises(UserError, match=r"ds.json cannot be read: Permission denied"):
        ds_config.read(path)


def test_auto_is_deepspeeds_own_default_and_floats_are_whole_numbers(tmp_path):
    config = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "optimizer": "auto",
        "steps_per_print": 2e3,
        "wall_clock_breakdown": "auto",
        "fp16": {"enabled": False, "loss_scale": 0},
        ZERO: {
            "stage": 3,
            "overlap_comm": True,
            "sub_group_size": 1e9,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_max_live_parameters": 1e9,
            "offload_param": {"device": "none", "pin_memory": "auto"},
        },
    }
    assert ds_config.read(write(tmp_path, config)) == {
        "steps_per_print": 2000,
        ZERO: {
            "stage": 3,
            "overlap_comm": True,
            "sub_group_size": 10**9,
            "stage3_max_live_parameters": 10**9,
            "offload_param": {"device": "none"},
        },
    }


def test_autocast_without_a_dtype_is_bfloat16_on_every_device(tmp_path):
    assert ds_config.read(write(tmp_path, {"torch_autocast": {"enabled": True}}))["torch_autocast"] == AUTOCAST


def test_buckets_that_no_device_holds_are_refused(tmp_path):
    import torch

    config = ds_config.read(
        write(tmp_path, {ZERO: {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 2**31 - 1}})
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**20}.get)
        with pytest.raises(UserError, match=r"reduce_bucket_size is 2147483647: .* take 16 GiB, and cpu has 4 GiB"):
            ds_config.check_memory(config, torch.device("cpu"), "ds.json")
        ds_config.check_memory(config | {ZERO: {"stage": 0}}, torch.device("cpu"), "ds.json")
