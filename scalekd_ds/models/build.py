"""Builds timm models by name, with weights from a hub or a file, and errors that say what to type instead."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import timm
from timm.models import load_model_config_from_hf
from timm.models._hub import download_from_hf, load_cfg_from_json, load_model_config_from_path
from torch import nn

import scalekd_ds.models.mlp_mixer_presets  # noqa: F401  registers its models with timm
from scalekd_ds.errors import UserError, cause_of, say, suggest
from scalekd_ds.models.card import card_path, read_card
from scalekd_ds.models.known_classes import name_classes_of_hub
from scalekd_ds.models.load_weights import Head, load_weights
from scalekd_ds.models.weights_file import TORCH_SUFFIXES
from scalekd_ds.names import utf8_path

# timm's prefixes of names that are not in its registry
HUB_PREFIXES = ("hf-hub:", "hf_hub:", "local-dir:")


def check_name(name: str) -> None:
    """Checks that timm has a model of this name.

    Raises:
        UserError: It has not; the message names the most similar ones.
    """
    if not name:
        raise UserError("the name of a model is empty: give a timm name, or the path of a .safetensors with its card.")
    if name.startswith(HUB_PREFIXES):
        architecture_and_kwargs(name)
    elif not timm.is_model(name) and os.path.isdir(name):
        paths = sorted(Path(name).glob("*.safetensors"))
        # without its card, a file in it would be refused in turn
        files = [path.name for path in paths if card_path(path).is_file()] or [path.name for path in paths]
        found = f"give a file in it ({files[0]})" if files else "give a .safetensors with its card, as a run writes"
        if _is_of_hub(Path(name)):
            found = f"give local-dir:{name}"
        raise UserError(f"{name!r} is a folder, and no model: {found}.")
    elif name.endswith(TORCH_SUFFIXES) or (not timm.is_model(name) and Path(name).exists()):
        raise UserError(
            f"{name!r} is a file of weights, which does not say what model it is: give the model's timm name, and the "
            f"file as --teacher_weights {name} (or --student_weights); or a .safetensors with its card."
        )
    elif not timm.is_model(name):
        architecture = name.split(".", 1)[0]
        raise UserError(f"unknown timm model {name!r}.{suggest(architecture, timm.list_models())}")


def _is_of_hub(folder: Path) -> bool:
    """Whether timm has written a folder, for whose file there is no card of ours."""
    if (folder / "model.json").is_file():
        return False
    try:
        return "architecture" in load_cfg_from_json(folder / "config.json")
    except (OSError, ValueError, TypeError):
        return False


def architecture_and_kwargs(name: str) -> tuple[str, dict[str, Any]]:
    """The timm name and the constructor arguments that a model's name stands for.

    Args:
        name: A timm name, which stands for itself; a hub's name (`hf-hub:` or `local-dir:`), whose `config.json` has
            them; or the path of a consolidated .safetensors, whose card has them.

    Raises:
        UserError: The config or the card cannot be read.
    """
    if name.endswith(".safetensors"):
        card = read_card(name)
        for key in ("architecture", "num_classes"):
            if key not in card:
                raise UserError(f"{card_path(name)} has no {key!r}: consolidate the checkpoint again.")
        return card["architecture"], dict(card.get("model_kwargs") or {})
    source, _, where = name.partition(":")
    if not name.startswith(HUB_PREFIXES):
        return name, {}
    read = load_model_config_from_path if source == "local-dir" else load_model_config_from_hf
    try:
        _, architecture, arguments = read(where)
        architecture, arguments = str(architecture), dict(arguments or {})
    # the hub raises its own, requests' and the system's errors
    except Exception as error:
        raise UserError(
            f"{name} has no model of timm's that can be read ({cause_of(error)}): it needs config.json and weights, "
            "as timm's push_to_hf_hub and save_for_hf write them."
        ) from None
    if not timm.is_model(architecture):
        raise UserError(f"{name} is of {architecture!r}, which timm lacks.{suggest(architecture, timm.list_models())}")
    return architecture, arguments


def _config_of(name: str) -> dict[str, Any]:
    """The config.json of a hub's model, which `architecture_and_kwargs` has read before."""
    source, _, where = name.partition(":")
    return load_cfg_from_json(
        Path(where, "config.json") if source == "local-dir" else download_from_hf(where, "config.json")
    )


def _create(name: str, **kwargs: Any) -> nn.Module:
    source, _, where = name.partition(":")
    try:
        if source == "local-dir" and os.path.isdir(where):
            with utf8_path(where) as path:
                return timm.create_model(f"{source}:{path}", **kwargs)
        return timm.create_model(name, **kwargs)
    # without arguments of the user's, an error is the network's, which the caller explains
    except Exception as error:
        shown = {k: v for k, v in kwargs.items() if k not in ("pretrained", "num_classes")}
        if kwargs["pretrained"] and not isinstance(error, TypeError | AssertionError | ValueError):
            raise
        if isinstance(error, TypeError) and "unexpected keyword" in str(error):
            raise UserError(f"{name} does not take these arguments: {cause_of(error)}.") from None
        raise UserError(f"{name} cannot be built with {shown}: {cause_of(error)}.") from None


# names of timm's modules whose models are built for one image size, though some of them also run on others
_GRID_FAMILIES = (
    *("vision_transformer", "swin", "eva", "beit", "deit", "mlp_mixer", "byoanet", "byobnet", "cait", "coat", "convit"),
    *("efficientformer_v2", "gcvit", "hiera", "levit", "maxxvit", "nest", "pit", "tnt", "visformer", "volo"),
)


def constructor_kwargs(name: str, kwargs: dict[str, Any], image_size: int | tuple[int, int] | None) -> dict[str, Any]:
    """All constructor arguments of a model.

    Args:
        name: As in `architecture_and_kwargs`.
        kwargs: Arguments that override those that the name stands for.
        image_size: Side or (h, w) in pixels, added as `img_size` where the model is built for one size; or None.
    """
    architecture, own = architecture_and_kwargs(name)
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
        name: timm name, also a hub's (`hf-hub:` or `local-dir:`), or the path of a consolidated .safetensors with its
            card beside it, which then gives the weights, and the arguments that `kwargs` does not have.
        num_classes: Width of the classifier, which is initialised anew where `weights` has another width. None keeps
            the model's own, or that of the file in `weights`.
        kwargs: Further constructor arguments; a `num_classes` here must be the file's.
        weights: `pretrained`, `none`, or a file of weights that `load_weights` takes; rank 0 prints what had to be
            resized or initialised anew.
        image_size: Side or (h, w) of the images in pixels, for models that are built for one size.

    Raises:
        UserError: An unknown name, arguments that the constructor refuses, weights that do not fit or cannot be read.
    """
    if name.endswith(".safetensors"):
        architecture, own = architecture_and_kwargs(name)
        card = read_card(name)
        own["num_classes"] = card["num_classes"]
        if lacking := [key for key in ("image_size", "mean", "std") if key not in card]:
            raise UserError(f"{card_path(name)} has no {lacking[0]!r}: consolidate the checkpoint again.")
        if num_classes is not None and image_size is not None:
            # with classes given, it is a student, which is built for its new images; a teacher keeps the card's size
            own.pop("img_size", None)
        model: Any = build_model(architecture, num_classes, {**own, **(kwargs or {})}, name, image_size)
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
            model = _create(name, pretrained=True, **kwargs)
        except UserError:
            raise
        # the hub raises its own, requests' and the system's errors; what a user can do is the same for all of them
        except Exception as error:
            cure = "check the network, or give a .safetensors or .pth file with --teacher_weights or --student_weights"
            if name.startswith("local-dir:"):
                cure = "give the file in it as --teacher_weights or --student_weights, with the model's timm name"
            if "size mismatch" in str(error):
                raise UserError(
                    f"pretrained weights of {name} do not fit this model with {kwargs}: {cause_of(error)}; timm "
                    "cannot resize them for another image size or shape."
                ) from None
            raise UserError(f"pretrained weights of {name} could not be loaded ({cause_of(error)}): {cure}.") from None
        if name.startswith(HUB_PREFIXES):
            name_classes_of_hub(model, _config_of(name))
        return model
    model = _create(name, pretrained=False, **kwargs)
    if weights != "none":
        head: Head = "new" if num_classes is not None else "exact" if "num_classes" in kwargs else "file"
        notes = load_weights(model, weights, head)
        say(f"{weights}: {'; '.join(notes)}" if notes else None)
    return model


def num_parameters(model: nn.Module) -> int:
    """Number of parameters of a module, also where ZeRO-3 has sharded them."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
