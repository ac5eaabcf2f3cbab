"""The JSON card beside a consolidated .safetensors: which model the weights are of, its classes, mean, std and size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scalekd_ds.errors import UserError


def card_path(weights: str | Path) -> Path:
    """Where the card of a consolidated weights file lies: beside it, with the suffix .json."""
    return Path(weights).with_suffix(".json")


def read_card(weights: str | Path) -> dict[str, Any]:
    """Reads the card of a consolidated weights file.

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
        return json.loads(card.read_text())
    except ValueError as error:
        raise UserError(f"{card} is not JSON ({error}): consolidate the checkpoint again.") from None


def eval_resize_at(card: dict[str, Any], image_size: int) -> int | None:
    """The shorter side before the centre crop of a card's model at `image_size` pixels; None is the default of any size.

    At another size than that of training the same share of each image is seen.
    """
    resize, trained = card.get("eval_resize"), card.get("image_size")
    if resize is None or not trained:
        return resize
    return round(resize * image_size / trained)
