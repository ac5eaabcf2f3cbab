"""A DeepSpeed JSON that is accepted runs: every key that the installed DeepSpeed reads is accepted, or refused by its name."""

import re

import pytest
from ds_jsons import AUTOCAST, BESIDE, TRIED, nested, refusal, write

from scalekd_ds.config import RunConfig
from scalekd_ds.engine import ds_config
from scalekd_ds.engine.ds_keys import KEYS, OFFLOAD, PARAM, REFUSED, SECTIONS, SWITCHED_OFF, ZERO
from scalekd_ds.errors import UserError

deepspeed_config = pytest.importorskip("deepspeed.runtime.config")


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
        ('{"steps_per_print": 1} {"seed": 1}', "is not JSON: Extra data"),
        ("zero_optimization:\n  stage: 2\n", "is not JSON"),
        ("zero_optimization: {\n  stage: [1,\n}", "is not JSON"),
        ("// two\n{seed: 1, seed: 2}", "the key 'seed' twice"),
        (
            {ZERO: {"stage": 2, "offload_optimizer": {"pin_memory": True}}},
            'offload_optimizer .*without "device": "cpu"',
        ),
        ({"csv_monitor": {"output_path": ""}}, "output_path is .* must be text that is not empty"),
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


@pytest.mark.parametrize(
    "content",
    [
        '{\n  // of mine\n  "steps_per_print": 7, # and here\n}',
        '/* of mine */ {"steps_per_print": 7,}',
        "{steps_per_print: 7}",
        '\ufeff{"steps_per_print": 7}',
    ],
)
def test_what_deepspeeds_own_reader_takes_is_taken(tmp_path, content):
    assert ds_config.read(write(tmp_path, content)) == {"steps_per_print": 7}


def test_null_is_deepspeeds_default_where_it_writes_so_itself(tmp_path):
    config = {"flops_profiler": {"enabled": False, "output_file": None}, "wandb": {"enabled": False, "team": None}}
    assert ds_config.read(write(tmp_path, config)) == {
        "flops_profiler": {"enabled": False},
        "wandb": {"enabled": False},
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
