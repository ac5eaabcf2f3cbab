"""timm models by name or from a consolidated file, with errors that say what to type instead."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from scalekd_ds.errors import UserError, suggest


@dataclass(frozen=True)
class Preprocessing:
    """How a model wants its pixels: mean and std in units of 0 to 1, None where nothing says; size (h, w) in pixels."""

    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    size: tuple[int, int] | None

    @classmethod
    def of(cls, model: nn.Module) -> Preprocessing:
        """Read from a timm model's `pretrained_cfg` and, for the size, from its patch embedding where it has one."""
        cfg = getattr(model, "pretrained_cfg", None) or {}
        size = getattr(getattr(model, "patch_embed", None), "img_size", None) or cfg.get("input_size", (0, 0, 0))[1:]
        size = (size, size) if isinstance(size, int) else tuple(size)
        mean, std = cfg.get("mean"), cfg.get("std")
        return cls(tuple(mean) if mean else None, tuple(std) if std else None, size if all(size) else None)


def check_name(name: str) -> None:
    """Raises UserError for a name that timm does not have, with the nearest ones."""
    if not timm.is_model(name):
        architecture = name.split(".", 1)[0]
        raise UserError(f"unknown timm model {name!r}.{suggest(architecture, timm.list_models())}")


def card_path(weights: str | Path) -> Path:
    """The JSON card beside a consolidated weights file."""
    return Path(weights).with_suffix(".json")


def read_card(weights: str | Path) -> dict[str, Any]:
    """The card of a consolidated file.

    Raises:
        UserError: No weights file, no card, or one that is not JSON.
    """
    weights, card = Path(weights), card_path(weights)
    if not weights.is_file():
        raise UserError(f"weights file {str(weights)!r} does not exist.")
    if not card.is_file():
        raise UserError(f"{weights} has no card: expected {card}, which launch/consolidate.py writes beside it.")
    try:
        return json.loads(card.read_text())
    except ValueError as error:
        raise UserError(f"{card} is not JSON ({error}): consolidate the checkpoint again.") from None


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Loads a .safetensors file into `model`, strictly.

    Raises:
        UserError: The file is missing or damaged, or its names or shapes differ (the first five of each are listed).
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"weights file {str(path)!r} does not exist.")
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable .safetensors file ({error}).") from None
    own = model.state_dict()
    problems = {
        "missing": [k for k in own if k not in state],
        "unexpected": [k for k in state if k not in own],
        "of another shape": [k for k in own if k in state and own[k].shape != state[k].shape],
    }
    if any(problems.values()):
        found = "; ".join(f"{len(keys)} {kind}: {', '.join(keys[:5])}" for kind, keys in problems.items() if keys)
        raise UserError(f"{path} does not fit {type(model).__name__}: {found}. Is it another architecture or width?")
    model.load_state_dict(state)


def _create(name: str, **kwargs: Any) -> nn.Module:
    try:
        return timm.create_model(name, **kwargs)
    except TypeError as error:
        raise UserError(f"{name} does not take these arguments: {error}.") from None
    except (AssertionError, ValueError, RuntimeError) as error:
        shown = {k: v for k, v in kwargs.items() if k not in ("pretrained", "num_classes")}
        raise UserError(f"{name} cannot be built with {shown}: {error}") from None


# transformers in timm that are built for one grid of patches, though some of them also run on others
_GRID_FAMILIES = ("vision_transformer", "swin", "eva", "beit", "deit", "mlp_mixer")


def constructor_kwargs(name: str, kwargs: dict[str, Any], image_size: int | None) -> dict[str, Any]:
    """`kwargs`, with the image size among them where the model's grid of patches depends on it."""
    module = timm.model_entrypoint(name.split(".", 1)[0]).__module__.rpartition(".")[2]
    if image_size is None or "img_size" in kwargs or not module.startswith(_GRID_FAMILIES):
        return dict(kwargs)
    return {**kwargs, "img_size": image_size}


def build_model(
    name: str,
    num_classes: int | None = None,
    kwargs: dict[str, Any] | None = None,
    weights: str = "none",
    image_size: int | None = None,
) -> nn.Module:
    """A timm model.

    Args:
        name: timm name, or the path of a consolidated .safetensors with its card beside it (kwargs and weights are
            then the card's).
        num_classes: Width of the head; None keeps the model's own.
        kwargs: Further constructor arguments.
        weights: `pretrained`, `none`, or a .safetensors file.
        image_size: Side of the images in pixels, for models that are built for one size.

    Raises:
        UserError: Unknown name, arguments that the constructor refuses, weights that do not fit or cannot be had.
    """
    if name.endswith(".safetensors"):
        card = read_card(name)
        for key in ("architecture", "num_classes"):
            if key not in card:
                raise UserError(f"{card_path(name)} has no {key!r}: consolidate the checkpoint again.")
        model = build_model(card["architecture"], card["num_classes"], card.get("model_kwargs"), name, image_size)
        model.pretrained_cfg = dict(
            getattr(model, "pretrained_cfg", None) or {},
            mean=tuple(card["mean"]),
            std=tuple(card["std"]),
            input_size=(3, card["image_size"], card["image_size"]),
        )
        return model
    check_name(name)
    kwargs = constructor_kwargs(name, kwargs or {}, image_size)
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    if weights == "pretrained":
        try:
            return _create(name, pretrained=True, **kwargs)
        except UserError:
            raise
        # the hub raises its own, requests' and the system's errors; what a user can do is the same for all of them
        except Exception as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"pretrained weights of {name} could not be loaded ({first}): check the network, or give a "
                ".safetensors file with --teacher_weights or --student_weights."
            ) from None
    model = _create(name, pretrained=False, **kwargs)
    if weights != "none":
        load_weights(model, weights)
    return model


def normalisation_of(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std that the model's pixels are normalised with, in units of 0 to 1; ImageNet's where it says nothing."""
    own = Preprocessing.of(model)
    return own.mean or IMAGENET_DEFAULT_MEAN, own.std or IMAGENET_DEFAULT_STD


def num_parameters(model: nn.Module) -> int:
    """Parameters of a module, whole ones also where ZeRO-3 has sharded them."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
