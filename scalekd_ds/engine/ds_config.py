"""The DeepSpeed JSON, which says how a run is executed: reads it, checks it, and merges the recipe into it."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from scalekd_ds.config import RunConfig
from scalekd_ds.engine.ds_check import checked, parse
from scalekd_ds.errors import UserError, suggest
from scalekd_ds.names import escape

FOLDER = Path(__file__).parent.parent / "ds_configs"

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
        # unlike is_file(), it takes a name that is too long for one that is missing
        if os.path.isfile(path):
            return path
    names = sorted(p.stem for p in FOLDER.glob("*.json"))
    raise UserError(f"DeepSpeed config {name!r} is neither a file nor in ds_configs/.{suggest(name, names)} {names}")


def read(name: str) -> dict[str, Any]:
    """Reads and checks one DeepSpeed JSON.

    Returns:
        What DeepSpeed gets of it: keys that are "auto" and sections that are off are left out.

    Raises:
        UserError: The file is missing or no JSON, or one of its keys or values is none that a run takes.
    """
    path = find(name)
    config = parse(path)
    for key, field in FROM_RECIPE.items():
        if config.get(key, "auto") != "auto":
            raise UserError(f'{path} sets {key!r}, which is the recipe\'s: write "auto" there and set --{field}.')
    config = checked({key: value for key, value in config.items() if key not in FROM_RECIPE}, path)
    autocast = config.get("torch_autocast", {})
    if autocast.get("enabled"):
        # DeepSpeed leaves the choice to the device otherwise, which is float16 on a GPU
        autocast.setdefault("dtype", "bfloat16")
    return config


def merge(config: dict[str, Any], run: RunConfig, world_size: int) -> dict[str, Any]:
    """The configuration for `deepspeed.initialize`: the JSON with the recipe's numbers and without monitors.

    Raises:
        UserError: The global batch cannot be split over `world_size` ranks.
    """
    micro, accumulation = run.batches(world_size)
    merged = {k: v for k, v in config.items() if k not in MONITORS}
    throughput = {"synchronized": False} | config.get("timers", {}).get("throughput", {})
    return merged | {
        # DeepSpeed's own default waits for the device twice in every micro batch, for a rate that it prints once in a while
        "timers": {"throughput": throughput},
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        # always written, because DeepSpeed clips at 1.0 by default
        "gradient_clipping": run.optim.clip,
        # DeepSpeed refuses optimizers that it does not know, such as our LAMB, which is tested under ZeRO here
        "zero_allow_untested_optimizer": True,
        # and, beside offload_optimizer, all but its own
        "zero_force_ds_cpu_optimizer": False,
    }


def autocast_dtype(config: dict[str, Any]) -> torch.dtype | None:
    """The dtype of `torch_autocast` in a DeepSpeed JSON, or None where it is off."""
    autocast = config.get("torch_autocast", {})
    return getattr(torch, autocast.get("dtype", "bfloat16")) if autocast.get("enabled") else None


def stage_of(config: dict[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed JSON, 0 to 3."""
    return config.get("zero_optimization", {}).get("stage", 0)


def check_memory(config: dict[str, Any], device: torch.device, name: str) -> None:
    """Checks that the device could hold the buckets for gradients, which DeepSpeed allocates at once.

    Args:
        config: The JSON, merged.
        device: Device of this rank.
        name: Name of the JSON, for messages.

    Raises:
        UserError: The buckets are larger than all of the memory.
    """
    zero = DeepSpeedZeroConfig(**config.get("zero_optimization", {}))
    buckets = 0 if zero.stage == 0 else 2 if zero.overlap_comm and zero.stage < 3 else 1
    if device.type == "cpu":
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        total = torch.cuda.get_device_properties(device).total_memory
    needed = buckets * zero.reduce_bucket_size * 4
    if needed > total:
        raise UserError(
            f"{name}: zero_optimization.reduce_bucket_size is {zero.reduce_bucket_size}: buckets of so many elements "
            f"take {needed / 2**30:,.0f} GiB, and {device} has {total / 2**30:,.0f} GiB: write a smaller number."
        )


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
        "wandb": {"enabled": True, "project": "scalekd_ds", "group": escape(run_dir.name)},
        "comet": {"enabled": True, "project": "scalekd_ds", "experiment_name": escape(run_dir.name)},
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
    if "comet" in merged:
        # of DeepSpeed's "samples", which are steps here: it would drop what comes sooner after the last
        merged["comet"] = {"samples_log_interval": 1} | merged["comet"]
    for name, package in (("wandb", "wandb"), ("comet", "comet_ml")):
        if merged.get(name, {}).get("enabled") and not _is_installed(package):
            raise UserError(f"the monitor {name} needs its package, which is not installed: pip install {package}")
    return merged


def _is_installed(package: str) -> bool:
    spec = find_spec(package)
    # Weights & Biases writes into a folder `wandb`, which Python takes for a package without a file
    return spec is not None and spec.origin is not None
