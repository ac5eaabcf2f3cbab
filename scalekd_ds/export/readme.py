"""The model card for people, README.md, written from the student's card and its run's configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scalekd_ds import __version__
from scalekd_ds.config import DataConfig
from scalekd_ds.export.student import TOLERANCE, LoadedStudent
from scalekd_ds.models.build import num_parameters
from scalekd_ds.names import escape

# the fields that Hugging Face reads; whoever publishes the model has to choose the licence
_FRONT_MATTER = """---
# license: (yours to fill in, such as apache-2.0)
library_name: {library}
pipeline_tag: image-classification
tags: [image-classification, {tags}, knowledge-distillation, scalekd]
---
"""


def _percent(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f}%"


def _table(rows: dict[str, Any]) -> str:
    cells = [
        f"| {name} | {escape(str(value)).replace('|', '/')} |"
        for name, value in rows.items()
        if value not in (None, "")
    ]
    return "\n".join(["| | |", "|---|---|", *cells])


def _model_rows(student: LoadedStudent) -> dict[str, Any]:
    card = student.card
    size = card["image_size"]
    shorter = DataConfig(image_size=size, eval_resize=card.get("eval_resize")).eval_shorter_side
    mean, std = ([round(v, 4) for v in card[key]] for key in ("mean", "std"))
    return {
        "architecture": f"`{card['architecture']}` of timm",
        "its arguments": f"`{json.dumps(card['model_kwargs'])}`" if card.get("model_kwargs") else None,
        "parameters": f"{num_parameters(student.model):,}",
        "classes": card["num_classes"],
        "images": f"{size}x{size}: shorter side to {shorter} ({card.get('interpolation', 'bicubic')}), centre crop",
        "mean, std": f"{mean}, {std}, in units of 0 to 1{'; inside the program' if student.normalised else ''}",
    }


def _accuracy_rows(card: dict[str, Any]) -> dict[str, Any]:
    return {
        "top-1": _percent(card.get("top1")),
        "top-5": _percent(card.get("top5")),
        "teacher's top-1": _percent(card.get("teacher_top1")) if card.get("teacher", "none") != "none" else None,
        "measured at step": card.get("step"),
        "weights": f"moving average, decay {card['ema_decay']:g}" if card.get("ema_decay") else "the student's own",
    }


def _training_rows(card: dict[str, Any], config: dict[str, Any] | None) -> dict[str, Any]:
    rows: dict[str, Any] = {"recipe": card.get("recipe"), "teacher": card.get("teacher", "none")}
    if config is None:
        return rows
    data, optim, schedule, distill = (config[key] for key in ("data", "optim", "schedule", "distill"))
    limits = {"train_images": "images", "images_per_class": "images a class"}
    used = [f"{data[key]:,} {what}" for key, what in limits.items() if data.get(key) is not None]
    # the folder's name alone, since its path says something about the user's disk
    rows["data"] = f"{Path(data['root']).name or data['train']} ({', '.join(used) or 'all training images'})"
    if card.get("teacher", "none") != "none":
        terms = [f"logit KD {distill['kd_weight']:g}"] if distill["kd_weight"] else []
        if distill["features"]:
            terms += [f"{key} {tuple(distill[key])}" for key in ("weights_s3", "weights_s4") if any(distill[key])]
        rows["distillation"] = f"ScaleKD: {', '.join(terms)}" if distill["features"] else ", ".join(terms)
    rows["loss on the labels"] = config["loss"]
    rows["optimizer"] = f"{optim['name']}, learning rate {optim['lr']:g}, weight decay {optim['weight_decay']:g}"
    rows["schedule"] = f"{schedule['name']}, {schedule['epochs']:g} epochs, {schedule['warmup_epochs']:g} of warm-up"
    rows["batch"] = config["global_batch_size"]
    augmentations = ("auto_augment", "random_erasing", "mixup", "cutmix", "hflip")
    rows["augmentation"] = ", ".join(f"{key} {data[key]}" for key in augmentations if data[key]) or "none"
    rows["seed"] = config["seed"]
    return rows


def readme(student: LoadedStudent, format: str, usage: str, difference: float) -> str:
    """The text of README.md.

    Args:
        student: The student that was exported.
        format: A key of `FORMATS`.
        usage: Python code that loads the folder.
        difference: The largest difference of the logits from the student's.
    """
    card = student.card
    trained = (
        f"distilled from `{card['teacher']}`" if card.get("teacher", "none") != "none" else "trained without a teacher"
    )
    library = "timm" if format in ("timm", "hf") else "onnx" if format == "onnx" else "pytorch"
    parts = [
        _FRONT_MATTER.format(library=library, tags="timm"),
        f"# {card['architecture']}, {trained}",
        f"{card['num_classes']} classes, top-1 {_percent(card.get('top1'))}.",
        "## Use it",
        f"```python\n{usage}\n```",
        "Loaded back so, its logits were the student's within "
        f"{difference:.1g} (at most {TOLERANCE:g}) at batches of 1 and 8.",
        "## The model",
        _table(_model_rows(student)),
        "## Accuracy",
        _table(_accuracy_rows(card)),
        "## How it was trained",
        _table(_training_rows(card, student.config)),
        f"By scalekd_ds {__version__} (ScaleKD, Fan et al., NeurIPS 2024). `model.json` has this, and the classes, as data.",
        "## Licence",
        "To be filled in by whoever publishes these weights: what the data and the teacher allow.",
    ]
    return "\n\n".join(parts).replace("---\n\n\n", "---\n\n") + "\n"
