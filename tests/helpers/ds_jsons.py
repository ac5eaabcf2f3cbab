"""Values of DeepSpeed's keys with which a run trains, and how a JSON of them is written, or refused."""

from __future__ import annotations

import json

import pytest

from scalekd_ds.engine import ds_config
from scalekd_ds.engine.ds_keys import OFFLOAD, PARAM, ZERO
from scalekd_ds.errors import UserError

AUTOCAST = {"enabled": True, "dtype": "bfloat16"}
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
    f"{OFFLOAD}.super_offload": {f"{OFFLOAD}.device": "cpu"},
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
