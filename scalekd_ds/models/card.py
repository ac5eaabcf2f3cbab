"""The JSON card beside a consolidated .safetensors: which model the weights are of, its classes, mean, std and size."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from scalekd_ds.errors import UserError, first_line

# beside a checkpoint's weights: what was measured after they were saved
EVALUATION = "evaluation.json"
_ACCURACIES = ("accuracy", "ema_accuracy", "teacher_accuracy", "best")


def card_path(weights: str | Path) -> Path:
    """Where the card of a consolidated weights file lies: beside it, with the suffix .json."""
    return Path(weights).with_suffix(".json")


def read_evaluation(folder: Path) -> dict[str, Any]:
    """What an evaluation has added to a checkpoint's `state`, and to its `cards` by their weights; empty before it.

    Raises:
        UserError: The file is damaged.
    """
    file = folder / EVALUATION
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text())
        state, cards = dict(found["state"]), {str(name): dict(card) for name, card in found["cards"].items()}
        for key, value in state.items():
            # it is in no manifest, and must not change what the checkpoint is of
            fits = (value is None or _is_accuracy(value)) if key in _ACCURACIES else _is_number(value)
            fits = fits or (key == "measured_on" and isinstance(value, str))
            if not fits or key in ("step", "samples", "world_size", "zero_stage"):
                raise ValueError(f"{key} is {json.dumps(value):.60}")
        return {"state": state, "cards": cards}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({first_line(error)}): remove it; it holds accuracies alone.") from None


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _is_accuracy(value: Any) -> bool:
    return isinstance(value, dict) and "top1" in value and all(map(_is_number, value.values()))


def read_card(weights: str | Path) -> dict[str, Any]:
    """Reads the card of a consolidated weights file, with the accuracy that was measured after they were saved.

    Raises:
        UserError: There is no such weights file, it has no card, or the card is not JSON.
    """
    weights, card = Path(weights), card_path(weights)
    if not weights.is_file():
        raise UserError(f"weights file {str(weights)!r} does not exist.")
    if not card.is_file():
        raise UserError(
            f"{weights} has no card: expected {card}, which launch/consolidate.py writes beside it. For weights of "
            f"another origin give the model's timm name, and the file as --teacher_weights {weights}."
        )
    try:
        found = json.loads(card.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{card} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{card} is not JSON ({first_line(error)}): consolidate the checkpoint again.") from None
    if not isinstance(found, dict):
        raise UserError(f"{card} holds a {type(found).__name__}, not a card: consolidate the checkpoint again.")
    _check(found, card)
    # a user's own file of that name lies beside no manifest
    measured = read_evaluation(weights.parent) if (weights.parent / "manifest.json").is_file() else {}
    return found | measured.get("cards", {}).get(weights.name, {})


def _check(card: dict[str, Any], path: Path) -> None:
    """Raises UserError for a field of a card that no release writes so; a field that is missing is the reader's business."""

    def numbers(value: Any, least: float) -> bool:
        return (
            isinstance(value, list) and len(value) == 3 and all(isinstance(v, int | float) and v > least for v in value)
        )

    def count(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0

    needs = {
        "architecture": (lambda v: isinstance(v, str) and v != "", "the name of a model"),
        "model_kwargs": (lambda v: v is None or isinstance(v, dict), "an object"),
        "num_classes": (count, "a number of classes"),
        "classes": (
            lambda v: v is None or (isinstance(v, list) and all(isinstance(n, str) for n in v)),
            "a list of names",
        ),
        "image_size": (lambda v: count(v) and v > 0, "a number of pixels"),
        "eval_resize": (lambda v: v is None or (count(v) and v > 0), "a number of pixels"),
        "mean": (lambda v: numbers(v, -math.inf), "three numbers"),
        "std": (lambda v: numbers(v, 0.0), "three positive numbers"),
        "interpolation": (lambda v: isinstance(v, str), "the name of a filter"),
    }
    for key, (is_right, need) in needs.items():
        if key in card and not is_right(card[key]):
            raise UserError(f"{path}: {key} is {card[key]!r:.60}: it must be {need}; consolidate the checkpoint again.")


def eval_resize_at(card: dict[str, Any], image_size: int) -> int | None:
    """The shorter side before the centre crop of a card's model at `image_size` pixels; None is the default of any size.

    At another size than that of training the same share of each image is seen.
    """
    resize, trained = card.get("eval_resize"), card.get("image_size")
    if resize is None or not trained:
        return resize
    return round(resize * image_size / trained)
