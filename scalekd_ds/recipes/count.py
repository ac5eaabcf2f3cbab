"""Parameters and multiply-adds of the recipes' models: `python -m scalekd_ds.recipes.count` writes sizes.json anew."""

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
    """`student` and `teacher` -> [parameters in millions, multiply-adds of one image's forward pass in thousand millions].

    Counted on tensors without storage; a teacher from a file is left out.
    """
    models = {"student": (cfg.student, cfg.student_kwargs, cfg.data.image_size)}
    if cfg.teacher != "none" and not cfg.teacher.endswith(".safetensors"):
        models["teacher"] = (cfg.teacher, cfg.teacher_kwargs, cfg.teacher_image_size or cfg.data.image_size)
    found = {}
    for role, (name, kwargs, size) in models.items():
        with torch.device("meta"):
            model = build_model(name, None, kwargs, image_size=size).eval()
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                model(torch.empty(1, 3, size, size))
        found[role] = [round(num_parameters(model) / 1e6, 2), round(counter.get_total_flops() / 2e9, 2)]
    return found


def main() -> None:
    SIZES.write_text(json.dumps({name: count(recipe()) for name, recipe in RECIPES.items()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
