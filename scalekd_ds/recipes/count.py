"""Counts the parameters and multiply-adds of all recipes; `python -m scalekd_ds.recipes.count` writes sizes.json."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from scalekd_ds.config import RunConfig
from scalekd_ds.models.build import build_model, num_parameters
from scalekd_ds.recipes import RECIPES

SIZES = Path(__file__).with_name("sizes.json")


def count(cfg: RunConfig) -> dict[str, list[float]]:
    """Counts the sizes of a run's models, on tensors without storage.

    Returns:
        For `student` and `teacher`: parameters in 10^6, and multiply-adds of one image's forward pass in 10^9. A
        teacher that is read from a file is left out.
    """
    models = {"student": (cfg.student, cfg.student_kwargs, cfg.data.image_size)}
    if cfg.teacher != "none" and not cfg.teacher.endswith(".safetensors"):
        models["teacher"] = (cfg.teacher, cfg.teacher_kwargs, cfg.teacher_image_size or cfg.data.image_size)
    sizes = {}
    for role, (name, kwargs, size) in models.items():
        with torch.device("meta"):
            model = build_model(name, None, kwargs, image_size=size).eval()
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                model(torch.empty(1, 3, size, size))
        sizes[role] = [round(num_parameters(model) / 1e6, 2), round(counter.get_total_flops() / 2e9, 2)]
    return sizes


def main() -> None:
    """Writes sizes.json anew, for all recipes."""
    SIZES.write_text(json.dumps({name: count(recipe()) for name, recipe in RECIPES.items()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
