"""The keys of a DeepSpeed JSON that a run takes, with their values, and why it takes no others.

DeepSpeed reads more than three hundred keys and skips those that it does not know. Each one is decided here: it does in
a run what DeepSpeed documents, or it may only have the value that describes what happens anyway, or it is refused.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

# as many elements as int32 counts, which some of NCCL's and DeepSpeed's kernels use
LARGEST = 2**31 - 1


@dataclass(frozen=True)
class Rule:
    """The values that a key may have.

    Attributes:
        expected: The values in words.
        fits: Whether a value is one of them.
        stages: The ZeRO stages at which the key does something.
        auto: Whether it may be "auto", which is DeepSpeed's own default.
        advice: What to write instead of another value.
        idle: The value that describes what happens anyway at the other stages, where there is one.
    """

    expected: str
    fits: Callable[[Any], bool]
    stages: tuple[int, ...] = (0, 1, 2, 3)
    auto: bool = True
    advice: str = ""
    idle: Any = None


def flag(*stages: int, auto: bool = True, idle: bool | None = None) -> Rule:
    """A rule for true or false."""
    return Rule("true or false", lambda value: isinstance(value, bool), stages or (0, 1, 2, 3), auto, idle=idle)


def always(value: bool | float | str, advice: str, *stages: int) -> Rule:
    """A rule for a key that may only say what happens anyway; `advice` is what to write instead of anything else."""
    text = repr(value).lower() if isinstance(value, bool) else repr(value)
    return Rule(text, lambda v: type(v) is type(value) and v == value, stages or (0, 1, 2, 3), advice=advice)


def whole(low: int, *stages: int, high: int = LARGEST, even: bool = False) -> Rule:
    """A rule for a whole number, which may be written as 1e9."""

    def fits(value: Any) -> bool:
        whole = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
        return whole and value == int(value) and not (even and value % 2)

    text = f"{'an even' if even else 'a whole'} number from {low} to {high}"
    return Rule(text, fits, stages or (0, 1, 2, 3))


def number(low: float, *stages: int, idle: float | None = None) -> Rule:
    """A rule for a finite number above `low`."""

    def fits(value: Any) -> bool:
        if not isinstance(value, int | float) or isinstance(value, bool):
            return False
        return math.isfinite(value) and low < value <= LARGEST

    return Rule(f"a number above {low:g}", fits, stages or (0, 1, 2, 3), idle=idle)


def one_of(*values: Any, stages: tuple[int, ...] = (0, 1, 2, 3), advice: str = "", idle: Any = None) -> Rule:
    """A rule for a choice, which may not be "auto"."""
    text = " or ".join(map(repr, values))
    return Rule(text, lambda v: any(type(v) is type(c) and v == c for c in values), stages, False, advice, idle)


def _is_module_class(name: Any) -> bool:
    try:
        package, name = name.rsplit(".", 1)
        return issubclass(getattr(import_module(package), name), nn.Module)
    # importing another's module may raise anything
    except Exception:
        return False


def _can_be_written(name: Any) -> bool:
    """Whether a file can be written under a name, for which DeepSpeed makes folders."""
    if not _is_text(name):
        return False
    path = Path(name).absolute()
    try:
        there = next(p for p in (path, *path.parents) if p.exists())
    except OSError:
        # a name that is too long
        return False
    return os.access(there, os.W_OK) and (there.is_dir() if there != path else not path.is_dir())


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value) and "\0" not in value


# null is DeepSpeed's own default of most of them
TEXT = Rule("text that is not empty, or null", lambda value: value is None or _is_text(value))
FILE = Rule("a file that can be written, or null", lambda value: value is None or _can_be_written(value))
MODULES = Rule(
    "a list of classes of modules such as 'torch.nn.Linear'",
    lambda value: isinstance(value, list) and bool(value) and all(map(_is_module_class, value)),
    (1, 2, 3),
)
ZERO, OFFLOAD, PARAM = "zero_optimization", "zero_optimization.offload_optimizer", "zero_optimization.offload_param"
AUTOCAST = '"torch_autocast": {"enabled": true, "dtype": "bfloat16"} is mixed precision here'
OWN_CHECKPOINTS = "the run writes checkpoints of its own, with the student whole in student.safetensors"
NVME = "checkpoints cannot be written from NVMe"
QUANTISED = "it rounds what it sends to a few bits, with which no recipe was trained"

# in use, or always as written
KEYS: dict[str, Rule] = {
    "torch_autocast.enabled": flag(auto=False),
    # with float16 DeepSpeed skips every step under ZeRO once one overflows, and clips the gradients before it unscales them
    "torch_autocast.dtype": one_of(
        "bfloat16", advice="float16 needs a loss scale, which DeepSpeed does not lower here"
    ),
    "torch_autocast.lower_precision_safe_modules": MODULES,
    "communication_data_type": one_of("fp32", "bf16", "fp16"),
    "prescale_gradients": flag(0, 1, 2, idle=False),
    "gradient_predivide_factor": number(0.0, 0, 1, 2, idle=1),
    "gradient_allreduce_op": always("mean", "a sum would multiply the recipe's learning rate by the number of ranks"),
    "steps_per_print": whole(1),
    "wall_clock_breakdown": flag(),
    "memory_breakdown": flag(),
    "dump_state": flag(),
    "disable_python_gc": flag(),
    "log_level": one_of("debug", "info", "warning", "error", "critical"),
    "timers.throughput.enabled": flag(),
    "timers.throughput.synchronized": flag(),
    "zero_allow_untested_optimizer": always(True, "the recipe's optimizers are tested under ZeRO here"),
    "zero_force_ds_cpu_optimizer": always(False, "the recipe's optimizer is torch's or this library's"),
    "flops_profiler.enabled": flag(auto=False),
    "flops_profiler.profile_step": whole(1),
    "flops_profiler.module_depth": whole(-1),
    "flops_profiler.top_modules": whole(1),
    "flops_profiler.detailed": flag(),
    "flops_profiler.output_file": FILE,
    "flops_profiler.recompute_fwd_factor": always(0.0, "no activations are recomputed"),
    "tensorboard.enabled": flag(auto=False),
    "tensorboard.output_path": TEXT,
    "tensorboard.job_name": TEXT,
    "csv_monitor.enabled": flag(auto=False),
    "csv_monitor.output_path": TEXT,
    "csv_monitor.job_name": TEXT,
    "wandb.enabled": flag(auto=False),
    "wandb.group": TEXT,
    "wandb.team": TEXT,
    "wandb.project": TEXT,
    "comet.enabled": flag(auto=False),
    "comet.samples_log_interval": whole(1),
    "comet.project": TEXT,
    "comet.workspace": TEXT,
    "comet.api_key": TEXT,
    "comet.experiment_name": TEXT,
    "comet.experiment_key": TEXT,
    "comet.online": flag(),
    "comet.mode": one_of("get", "create", "get_or_create"),
    f"{ZERO}.stage": one_of(0, 1, 2, 3),
    f"{ZERO}.contiguous_gradients": flag(1, 2, 3),
    f"{ZERO}.reduce_scatter": flag(1, 2, 3),
    f"{ZERO}.reduce_bucket_size": whole(1, 1, 2, 3),
    f"{ZERO}.use_multi_rank_bucket_allreduce": flag(1, 2),
    f"{ZERO}.allgather_partitions": always(True, "DeepSpeed always gathers so", 1, 2),
    f"{ZERO}.allgather_bucket_size": whole(2, 1, 2, even=True),
    f"{ZERO}.overlap_comm": flag(1, 2, 3),
    f"{ZERO}.compute_grad_norm": always(True, "the run logs the norm and skips steps by it"),
    f"{ZERO}.round_robin_gradients": flag(1, 2),
    f"{ZERO}.parameter_alignment": flag(1, 2),
    f"{ZERO}.ignore_unused_parameters": always(True, "the recipe says which layers train"),
    f"{ZERO}.sub_group_size": whole(1, 3, high=10**15),
    f"{ZERO}.stage3_prefetch_bucket_size": whole(0, 3, high=10**15),
    f"{ZERO}.stage3_param_persistence_threshold": whole(0, 3, high=10**15),
    f"{ZERO}.stage3_model_persistence_threshold": whole(0, 3, high=10**15),
    f"{ZERO}.stage3_max_live_parameters": whole(0, 3, high=10**15),
    f"{ZERO}.stage3_max_reuse_distance": whole(0, 3, high=10**15),
    f"{ZERO}.stage3_module_granularity_threshold": whole(0, 3, high=10**15),
    f"{ZERO}.stage3_use_all_reduce_for_fetch_params": flag(3),
    f"{ZERO}.stage3_allgather_sequential": flag(3),
    f"{ZERO}.stage3_gather_16bit_weights_on_model_save": always(False, OWN_CHECKPOINTS),
    f"{ZERO}.memory_efficient_linear": flag(3),
    f"{ZERO}.override_module_apply": always(True, "the run calls no such function"),
    f"{ZERO}.log_trace_cache_warnings": flag(3),
    f"{ZERO}.enable_sanity_checks": flag(3),
    f"{ZERO}.load_from_fp32_weights": always(True, OWN_CHECKPOINTS),
    f"{ZERO}.elastic_checkpoint": always(False, "any number of ranks can resume a checkpoint anyway"),
    f"{ZERO}.pipeline_loading_checkpoint": always(False, OWN_CHECKPOINTS),
    f"{ZERO}.legacy_stage1": always(False, "DeepSpeed removed it"),
    f"{ZERO}.zero_hpz_partition_size": always(1, "secondary partitions are not tested with the run's checkpoints"),
    f"{ZERO}.zero_quantized_weights": always(False, QUANTISED),
    f"{ZERO}.zero_quantized_nontrainable_weights": always(False, QUANTISED),
    f"{ZERO}.zero_quantized_gradients": always(False, QUANTISED),
    f"{ZERO}.save_muon_momentum_buffer_in_memory": always(False, "no recipe uses Muon"),
    f"{OFFLOAD}.device": one_of("none", "cpu", stages=(1, 2, 3), advice=NVME, idle="none"),
    f"{OFFLOAD}.pin_memory": flag(1, 2, 3),
    f"{OFFLOAD}.ratio": always(1.0, "a part can only be offloaded of DeepSpeedCPUAdam", 1, 2, 3),
    f"{OFFLOAD}.super_offload": always(False, "it needs DeepSpeedCPUAdam", 1, 2, 3),
    f"{PARAM}.device": one_of("none", "cpu", stages=(3,), advice=NVME, idle="none"),
    f"{PARAM}.pin_memory": flag(3),
}
# DeepSpeed takes these by both names
KEYS |= {
    f"{ZERO}.{name}": KEYS[f"{ZERO}.stage3_{name}"]
    for name in (
        *("prefetch_bucket_size", "param_persistence_threshold", "model_persistence_threshold", "max_live_parameters"),
        *("max_reuse_distance", "gather_16bit_weights_on_model_save", "module_granularity_threshold"),
        *("use_all_reduce_for_fetch_params", "allgather_sequential"),
    )
}
# sections that may be there as long as they are off; DeepSpeed does not get to see them
SWITCHED_OFF = {
    "bf16": f"DeepSpeed would train the weights themselves in bfloat16, norms and all: {AUTOCAST}",
    "bfloat16": f"DeepSpeed would train the weights themselves in bfloat16, norms and all: {AUTOCAST}",
    "fp16": f"DeepSpeed would train the weights themselves in float16, norms and all: {AUTOCAST}",
    "comms_logger": "TensorBoard has the time of the collectives as system/share_communication",
    "autotuning": "`scalekd plan` compares ZeRO stages and micro batches",
    "data_efficiency": "the recipe says in which order images come",
    "hybrid_engine": "it is for language models that generate text",
}
# keys and whole sections that DeepSpeed knows and a run does not take, and what to do instead
REFUSED = {
    "amp": f"DeepSpeed removed it: {AUTOCAST}",
    "data_types": f"weights, buffers and sums of gradients are float32: {AUTOCAST}",
    "activation_checkpointing": "the models do not recompute activations by DeepSpeed's functions",
    "checkpoint": f"{OWN_CHECKPOINTS}: set --run.keep_last, --run.keep_best and --run.resume",
    "load_universal": "any number of ranks can resume a checkpoint anyway",
    "datastates_ckpt": OWN_CHECKPOINTS,
    "aio": f"it is for offloading to NVMe, and {NVME}",
    "compile": "the engine is not compiled; --run.compile compiles the parts of a step",
    "disable_allgather": "DeepSpeed reads it and does nothing with it",
    "dataloader_drop_last": "the run has a loader of its own, and each epoch is cut into whole batches",
    "vocabulary_size": "there is no vocabulary",
    "managed_gradient_accumulation": "the run accumulates as global_batch_size and micro_batch_size say",
    "seq_parallel_communication_data_type": "there is no sequence parallelism",
    "sequence_parallel_size": "there is no sequence parallelism",
    "tensor_parallel": "there is no tensor parallelism: ZeRO-3 shards the student, --run.teacher_placement the teacher",
    "pipeline": "there is no pipeline parallelism: ZeRO-3 shards the student, --run.teacher_placement the teacher",
    "expert_parallel": "there are no mixtures of experts",
    "use_data_before_expert_parallelism": "there are no mixtures of experts",
    "weight_quantization": "the recipe says in what precision weights are trained",
    "elasticity": "DeepSpeed removed it; a run can resume on any number of ranks",
    "sparse_attention": "DeepSpeed removed it",
    "seed": "set --seed",
    f"{ZERO}.zenflow": "it updates a part of the weights later, with which no recipe was trained",
    f"{ZERO}.leaf_module": "the parameters are gathered module by module",
    f"{ZERO}.cpu_offload": '"offload_optimizer": {"device": "cpu"} is its name today',
    f"{ZERO}.cpu_offload_param": '"offload_param": {"device": "cpu"} is its name today',
    f"{ZERO}.cpu_offload_use_pin_memory": '"pin_memory" in "offload_optimizer" is its name today',
    f"{ZERO}.stage3_gather_fp16_weights_on_model_save": OWN_CHECKPOINTS,
    f"{OFFLOAD}.nvme_path": f"it is for offloading to NVMe, and {NVME}",
    f"{OFFLOAD}.buffer_count": f"it is for offloading to NVMe, and {NVME}",
    f"{OFFLOAD}.pipeline_read": f"it is for offloading to NVMe, and {NVME}",
    f"{OFFLOAD}.pipeline_write": f"it is for offloading to NVMe, and {NVME}",
    f"{OFFLOAD}.fast_init": f"it is for offloading to NVMe, and {NVME}",
    f"{OFFLOAD}.cpuadam_cores_perc": "it needs DeepSpeedCPUAdam",
    f"{PARAM}.nvme_path": f"it is for offloading to NVMe, and {NVME}",
    f"{PARAM}.buffer_count": f"it is for offloading to NVMe, and {NVME}",
    f"{PARAM}.buffer_size": f"it is for offloading to NVMe, and {NVME}",
    f"{PARAM}.max_in_cpu": f"it is for offloading to NVMe, and {NVME}",
}
# every key that holds others
SECTIONS = {name.rsplit(".", depth)[0] for name in KEYS for depth in range(1, name.count(".") + 1)}
