"""Says at the start of a run what is trained on what, for how long, on which devices, and where its files go."""

from __future__ import annotations

import torch
from deepspeed import comm as dist

from scalekd_ds.names import escape
from scalekd_ds.training.run import Run

# of the labels of the pairing table, which stands above these lines
_LABEL = 17


def start_lines(run: Run) -> list[str]:
    """The lines, as further rows of the pairing table."""
    cfg = run.cfg
    rows = {
        "recipe": cfg.recipe,
        "student": escape(cfg.student),
        "teacher": escape(cfg.teacher) if run.teacher is not None else "",
        "images": f"{len(run.train_loader.source):,} to train on, {len(run.val_loader.source):,} to evaluate on",
        "folder": escape(cfg.data.root) if cfg.data.root else "",
        "course": f"{cfg.schedule.epochs:g} epoch{'s' * (cfg.schedule.epochs != 1)}, {run.total_steps:,} steps of "
        f"{cfg.global_batch_size:,} images; {cfg.optim.name}, lr {cfg.learning_rate:g}",
        "devices": f"{dist.get_world_size()} x {_device(run)}, {_precision(run)} ({cfg.run.ds_config})",
        "writes to": escape(cfg.run.dir),
    }
    return [f"{label:<{_LABEL}}  {text}" for label, text in rows.items() if text]


def _device(run: Run) -> str:
    if run.device.type == "cpu":
        return f"CPU ({torch.get_num_threads()} thread{'s' * (torch.get_num_threads() != 1)})"
    return torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else run.device.type


def _precision(run: Run) -> str:
    """The dtype that the models compute in."""
    engine = run.engine
    dtype = engine.torch_autocast_dtype() if engine.torch_autocast_enabled() else torch.float32
    return str(dtype).removeprefix("torch.")
