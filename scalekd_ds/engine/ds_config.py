"""The DeepSpeed JSON, which says how a run is executed: reads it, checks it, and merges the recipe into it."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from scalekd_ds.config import RunConfig
from scalekd_ds.errors import UserError, suggest

FOLDER = Path(__file__).parent.parent / "ds_configs"

# the top-level keys that DeepSpeed 0.19 reads; it ignores any other without a warning
KNOWN_KEYS = frozenset(
    """train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping
    zero_optimization torch_autocast bf16 fp16 data_types communication_data_type prescale_gradients
    gradient_predivide_factor gradient_allreduce_op steps_per_print wall_clock_breakdown memory_breakdown dump_state
    tensorboard wandb csv_monitor comet comms_logger flops_profiler activation_checkpointing aio checkpoint
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer disable_allgather disable_python_gc compile timers
    check_overflow seed log_level use_node_local_storage optimizer scheduler train_micro_batch_size""".split()
)
# keys that the recipe sets, and its fields; the JSON may have them as "auto", which tells a reader where they come from
FROM_RECIPE = {
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "global_batch_size",
    "gradient_clipping": "optim.clip",
    "train_batch_size": "global_batch_size",
    "optimizer": "optim.name",
    "scheduler": "schedule.name",
}
MONITORS = ("tensorboard", "wandb", "csv_monitor", "comet")


def find(name: str) -> Path:
    """The path of a DeepSpeed JSON, from that path or from its name in ds_configs/.

    Raises:
        UserError: There is no such file.
    """
    for path in (Path(name), FOLDER / name, FOLDER / f"{name}.json"):
        if path.is_file():
            return path
    names = sorted(p.stem for p in FOLDER.glob("*.json"))
    raise UserError(f"DeepSpeed config {name!r} is neither a file nor in ds_configs/.{suggest(name, names)} {names}")


def read(name: str) -> dict[str, Any]:
    """Reads and checks one DeepSpeed JSON.

    Raises:
        UserError: The file is missing or no JSON, or it has a key that DeepSpeed does not know or has removed, or that
            the recipe sets.
    """
    path = find(name)
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}.") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} holds a {type(config).__name__}: it must be a JSON object.")
    _check_removed(config, path)
    for key in config:
        if key not in KNOWN_KEYS:
            raise UserError(f"{path}: DeepSpeed does not know the key {key!r}.{suggest(key, KNOWN_KEYS)}")
    for key, field in FROM_RECIPE.items():
        if config.get(key, "auto") != "auto":
            raise UserError(f'{path} sets {key!r}, which is the recipe\'s: write "auto" there and set --{field}.')
    _check_zero(config, path)
    _check_autocast(config, path)
    return config


def _check_removed(config: dict[str, Any], path: Path) -> None:
    # DeepSpeed's own check, made before the ranks connect, and without its traceback
    from deepspeed.runtime import config as deepspeed_config

    check = getattr(deepspeed_config, "_reject_removed_config_keys", None)
    if check is None:
        return
    try:
        check(config)
    except deepspeed_config.DeepSpeedConfigError as error:
        raise UserError(f"{path}: {error} Remove that key.") from None


def _check_zero(config: dict[str, Any], path: Path) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    zero = config.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise UserError(f'{path}: zero_optimization is {zero!r}: it must be an object such as {{"stage": 1}}.')
    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        hint = suggest(name, DeepSpeedZeroConfig.model_fields) if first["type"] == "extra_forbidden" else ""
        raise UserError(f"{path}: zero_optimization.{name} is {first['input']!r}: {first['msg']}.{hint}") from None


def _check_autocast(config: dict[str, Any], path: Path) -> None:
    autocast = config.get("torch_autocast", {})
    if not isinstance(autocast, dict):
        raise UserError(f'{path}: torch_autocast is {autocast!r}: it must be an object such as {{"enabled": true}}.')
    dtype = autocast.get("dtype", "bfloat16")
    if dtype not in ("bfloat16", "float16"):
        raise UserError(f"{path}: torch_autocast.dtype is {dtype!r}: it must be 'bfloat16' or 'float16'.")


def merge(config: dict[str, Any], run: RunConfig, world_size: int) -> dict[str, Any]:
    """The configuration for `deepspeed.initialize`: the JSON with the recipe's numbers and without monitors.

    Raises:
        UserError: The global batch cannot be split over `world_size` ranks.
    """
    micro, accumulation = run.batches(world_size)
    merged = {k: v for k, v in config.items() if k not in MONITORS and k not in FROM_RECIPE}
    return merged | {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        # always written, because DeepSpeed clips at 1.0 by default
        "gradient_clipping": run.optim.clip,
        # DeepSpeed refuses optimizers that it does not know, such as our LAMB, which is tested under ZeRO here
        "zero_allow_untested_optimizer": True,
    }


def autocast_dtype(config: dict[str, Any]) -> torch.dtype | None:
    """The dtype of `torch_autocast` in a DeepSpeed JSON, or None where it is off."""
    autocast = config.get("torch_autocast", {})
    return getattr(torch, autocast.get("dtype", "bfloat16")) if autocast.get("enabled") else None


def compute_dtype(config: dict[str, Any]) -> torch.dtype | None:
    """The 16-bit type that a config computes in, by torch_autocast or by DeepSpeed's own sections; None for float32."""
    for section, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if config.get(section, {}).get("enabled") is True:
            return dtype
    return autocast_dtype(config)


def stage_of(config: dict[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed JSON, 0 to 3."""
    return config.get("zero_optimization", {}).get("stage", 0)


def monitors(config: dict[str, Any], run_dir: Path, names: str = "") -> dict[str, Any]:
    """The settings of the monitors (TensorBoard and the like), as DeepSpeed's monitor takes them.

    Args:
        config: The DeepSpeed JSON, which may set monitors itself.
        run_dir: Folder of the run, below which TensorBoard's and .csv files are written.
        names: `run.monitors`, separated by commas; empty is TensorBoard, with what the JSON sets for it.

    Raises:
        UserError: A name is unknown, set in both places, or that of a service whose package is not installed.
    """
    chosen = {name: config[name] for name in MONITORS if name in config}
    defaults = {
        "tensorboard": {"enabled": True, "output_path": str(run_dir), "job_name": "tensorboard"},
        "csv": {"enabled": True, "output_path": str(run_dir), "job_name": "csv"},
        "wandb": {"enabled": True, "project": "scalekd_ds", "group": run_dir.name},
        "comet": {"enabled": True, "project": "scalekd_ds", "experiment_name": run_dir.name},
    }
    listed = [name.strip() for name in names.split(",") if name.strip()]
    for name in listed:
        if name not in defaults:
            raise UserError(f"run.monitors names {name!r}.{suggest(name, defaults)} Known: {', '.join(defaults)}.")
        key = "csv_monitor" if name == "csv" else name
        if key in chosen:
            raise UserError(
                f"{name} is set in run.monitors and as {key!r} in the DeepSpeed JSON: set it in one of them."
            )
    merged = chosen | {("csv_monitor" if name == "csv" else name): defaults[name] for name in dict.fromkeys(listed)}
    if not listed:
        merged["tensorboard"] = defaults["tensorboard"] | chosen.get("tensorboard", {})
    for name, package in (("wandb", "wandb"), ("comet", "comet_ml")):
        if merged.get(name, {}).get("enabled") and find_spec(package) is None:
            raise UserError(f"the monitor {name} needs its package, which is not installed: pip install {package}")
    return merged
