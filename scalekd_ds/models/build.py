"""timm models by name, with weights from a hub or a file, and errors that say what to type instead."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import timm
from timm.models import load_model_config_from_hf
from timm.models._hub import load_model_config_from_path
from torch import nn

import scalekd_ds.models.mlp_mixer_presets  # noqa: F401  registers them with timm
from scalekd_ds.errors import UserError, suggest
from scalekd_ds.models.card import card_path, read_card
from scalekd_ds.models.load_weights import load_weights
from scalekd_ds.models.weights_file import TORCH_SUFFIXES

# timm's own prefixes for models outside its registry
HUBS = ("hf-hub:", "hf_hub:", "local-dir:")


def check_name(name: str) -> None:
    """Raises UserError for a name that timm does not have, with the nearest ones."""
    if name.startswith(HUBS):
        origin_of(name)
    elif name.endswith(TORCH_SUFFIXES) or (not timm.is_model(name) and Path(name).exists()):
        raise UserError(
            f"{name!r} is a file of weights, which does not say what model it is: give the model's timm name, and the "
            f"file as --teacher_weights {name} (or --student_weights); or a .safetensors with its card."
        )
    elif not timm.is_model(name):
        architecture = name.split(".", 1)[0]
        raise UserError(f"unknown timm model {name!r}.{suggest(architecture, timm.list_models())}")


def origin_of(name: str) -> tuple[str, dict[str, Any]]:
    """timm's name and constructor arguments behind a name, a hub's `config.json`, or a consolidated file's card.

    Raises:
        UserError: Such a config or card cannot be had.
    """
    if name.endswith(".safetensors"):
        card = read_card(name)
        for key in ("architecture", "num_classes"):
            if key not in card:
                raise UserError(f"{card_path(name)} has no {key!r}: consolidate the checkpoint again.")
        return card["architecture"], dict(card.get("model_kwargs") or {})
    source, _, where = name.partition(":")
    if not name.startswith(HUBS):
        return name, {}
    read = load_model_config_from_path if source == "local-dir" else load_model_config_from_hf
    try:
        _, architecture, arguments = read(where)
        return architecture, dict(arguments or {})
    # the hub raises its own, requests' and the system's errors
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{name} has no model of timm's that can be read ({first}): it needs config.json and weights, as timm's "
            "push_to_hf_hub and save_for_hf write them."
        ) from None


def _create(name: str, **kwargs: Any) -> nn.Module:
    try:
        return timm.create_model(name, **kwargs)
    except TypeError as error:
        raise UserError(f"{name} does not take these arguments: {error}.") from None
    except (AssertionError, ValueError, RuntimeError) as error:
        shown = {k: v for k, v in kwargs.items() if k not in ("pretrained", "num_classes")}
        raise UserError(f"{name} cannot be built with {shown}: {error}") from None


# timm's modules of models that are built for one grid of patches, though some of them also run on others
_GRID_FAMILIES = (
    *("vision_transformer", "swin", "eva", "beit", "deit", "mlp_mixer", "byoanet", "byobnet", "cait", "coat", "convit"),
    *("efficientformer_v2", "gcvit", "hiera", "levit", "maxxvit", "nest", "pit", "tnt", "visformer", "volo"),
)


def constructor_kwargs(name: str, kwargs: dict[str, Any], image_size: int | tuple[int, int] | None) -> dict[str, Any]:
    """`kwargs` over those of the model's origin, with the image size where its grid of patches depends on it."""
    architecture, own = origin_of(name)
    module = timm.model_entrypoint(architecture.split(".", 1)[0]).__module__.rpartition(".")[2]
    if image_size is None or "img_size" in kwargs or not module.startswith(_GRID_FAMILIES):
        return {**own, **kwargs}
    return {**own, **kwargs, "img_size": image_size}


def build_model(
    name: str,
    num_classes: int | None = None,
    kwargs: dict[str, Any] | None = None,
    weights: str = "none",
    image_size: int | tuple[int, int] | None = None,
) -> nn.Module:
    """A timm model.

    Args:
        name: timm name (`hf-hub:` and `local-dir:` ones too), or the path of a consolidated .safetensors with its card
            beside it (weights, and what kwargs do not say, are then the card's).
        num_classes: Width of the head; one that `weights` does not have starts fresh. None keeps the model's own, or
            that of the file in `weights`.
        kwargs: Further constructor arguments; a `num_classes` here must be the file's.
        weights: `pretrained`, `none`, or a file of weights as `weights.load_weights` takes them; what had to be resized
            or left fresh is printed.
        image_size: Side or (h, w) of the images in pixels, for models that are built for one size.

    Raises:
        UserError: Unknown name, arguments that the constructor refuses, weights that do not fit or cannot be had.
    """
    if name.endswith(".safetensors"):
        architecture, own = origin_of(name)
        card = read_card(name)
        own["num_classes"] = card["num_classes"]
        if num_classes is not None and image_size is not None:
            # a teacher keeps the size that it knows; a student takes that of its new images
            own.pop("img_size", None)
        model = build_model(architecture, num_classes, {**own, **(kwargs or {})}, name, image_size)
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
                ".safetensors or .pth file with --teacher_weights or --student_weights."
            ) from None
    model = _create(name, pretrained=False, **kwargs)
    if weights != "none":
        head = "new" if num_classes is not None else "exact" if "num_classes" in kwargs else "file"
        notes = load_weights(model, weights, head)
        if notes and os.environ.get("RANK", "0") == "0":
            print(f"{weights}: {'; '.join(notes)}", flush=True)
    return model


def num_parameters(model: nn.Module) -> int:
    """Parameters of a module, whole ones also where ZeRO-3 has sharded them."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
