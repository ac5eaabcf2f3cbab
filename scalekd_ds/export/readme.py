"""The model card for people, README.md, written from the student's card and its run's configuration."""

from __future__ import annotations

import json
from typing import Any

from scalekd_ds import __version__
from scalekd_ds.config import DataConfig
from scalekd_ds.export.front_matter import front_matter
from scalekd_ds.export.origin import data_name, origin_of, teacher_origin
from scalekd_ds.export.student import TOLERANCE, LoadedStudent
from scalekd_ds.export.training_command import training_command
from scalekd_ds.models.build import num_parameters
from scalekd_ds.names import escape

NO_LICENCE = "To be filled in by whoever publishes these weights: what the data and the teacher allow."
_REPOSITORY = "https://github.com/scalekd-ds/scalekd_ds"
_CITATION = """```bibtex
@inproceedings{fan2024scalekd,
  title     = {ScaleKD: Strong Vision Transformers Could Be Excellent Teachers},
  author    = {Fan, Jiawei and Li, Chao and Liu, Xiaolong and Yao, Anbang},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2024},
  url       = {https://arxiv.org/abs/2411.06786}
}
```"""


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


def _accuracy_rows(card: dict[str, Any], results: dict[str, Any] | None) -> dict[str, Any]:
    rows = {
        "top-1": _percent(card.get("top1")),
        "top-5": _percent(card.get("top5")),
        "teacher's top-1": _percent(card.get("teacher_top1")) if card.get("teacher", "none") != "none" else None,
        "measured at step": card.get("step"),
        "weights": f"moving average, decay {card['ema_decay']:g}" if card.get("ema_decay") else "the student's own",
    }
    if results is None:
        return rows
    best = results.get("best") or {}
    if best.get("top1") is not None and best.get("step") != card.get("step"):
        rows["best in training"] = (
            f"{_percent(best['top1'])} at step {best['step']}, whose weights are others than these"
        )
    if results.get("total_steps") not in (None, card.get("step")):
        rows["steps of the whole schedule"] = results["total_steps"]
    if results.get("ema_top1") is not None:
        rows["top-1 of the student's own weights, and of their average"] = (
            f"{_percent(results.get('student_top1'))}, {_percent(results['ema_top1'])}"
        )
    if results.get("val_images"):
        left_out = results.get("val_images_left_out") or 0
        rows["validation images"] = f"{results['val_images']:,}" + (f", {left_out:,} unreadable" if left_out else "")
    return rows


def _training_rows(card: dict[str, Any], config: dict[str, Any] | None) -> dict[str, Any]:
    rows: dict[str, Any] = {"recipe": card.get("recipe"), "teacher": card.get("teacher", "none")}
    if config is None:
        return rows
    data, optim, schedule, distill = (config[key] for key in ("data", "optim", "schedule", "distill"))
    limits = {"train_images": "images", "images_per_class": "images a class"}
    used = [f"{data[key]:,} {what}" for key, what in limits.items() if data.get(key) is not None]
    if origin := teacher_origin(card, config):
        rows["teacher's weights"] = origin.text + (f", licence {origin.license}" if origin.license else "")
    rows["student began from"] = origin_of(config["student"], config["student_weights"]).text
    rows["data"] = f"{data_name(config)} ({', '.join(used) or 'all training images'})"
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
        front_matter(card, student.config, library),
        f"# {card['architecture']}, {trained}",
        f"{card['num_classes']} classes, top-1 {_percent(card.get('top1'))}.",
        "## Use it",
        f"```python\n{usage}\n```",
        "Loaded back so, its logits were the student's within "
        f"{difference:.1g} (at most {TOLERANCE:g}) at batches of 1 and 8.",
        "## The model",
        _table(_model_rows(student)),
        "## Accuracy",
        _table(_accuracy_rows(card, student.results)),
        "## How it was trained",
        _table(_training_rows(card, student.config)),
        *_again(student.config),
        f"By scalekd_ds {__version__} (ScaleKD, Fan et al., NeurIPS 2024). `model.json` has the model, its accuracy and "
        "its classes as data.",
        "## Limits",
        _limits(student),
        "## Licence",
        NO_LICENCE,
        *_teachers_licence(student),
        "## Citation",
        _CITATION,
    ]
    return "\n\n".join(parts) + "\n"


def _again(config: dict[str, Any] | None) -> list[str]:
    """The command that trains the student again."""
    if config is None:
        return []
    lines = "\n".join(f"    {line}" for line in training_command(config).splitlines())
    where = "`DIR` holds the images, `train/` and `val/`. " if config["data"]["root"] else ""
    return [
        f"To train it again with [scalekd_ds]({_REPOSITORY}):",
        lines,
        f"{where}Settings that are not named are its recipe's.",
    ]


def _limits(student: LoadedStudent) -> str:
    """What a reader must not take from the numbers above."""
    config, card = student.config, student.card
    seed = f" (seed {config['seed']})" if config else ""
    lines = [
        f"The accuracy is that of one run{seed} on the validation images of its own data, by which nothing is known about "
        "images of another kind.",
        f"It answers with one of its {card['num_classes']} classes for any image, also for one that shows none of them.",
        "Its errors on groups of people or kinds of images have not been looked at, nor has what it learnt from its teacher.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _teachers_licence(student: LoadedStudent) -> list[str]:
    origin = teacher_origin(student.card, student.config)
    if origin is None or origin.license is None:
        return []
    return [
        f"The teacher's weights are published under `{origin.license}`, which may bind what is distilled from them; so may "
        "the terms of the images."
    ]
