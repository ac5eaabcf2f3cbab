"""Loads weights from a file into a timm model, or says in one line why they do not fit.

In this order: the model is found among what its file holds, prefixes of wrappers are stripped, mmpretrain's names become
timm's, timm's own filter for the family of models converts the releases that it knows (Microsoft's Swin, DINOv2, DINOv3,
CLIP, ...) and resizes position tables, the classifier is fitted, and the result must agree with the model in every name
and shape.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from scalekd_ds.errors import UserError
from scalekd_ds.models import mmpretrain
from scalekd_ds.models.classifier import classes_of_file, classifier_names, reset_classifier
from scalekd_ds.models.known_classes import name_classes
from scalekd_ds.models.mismatch import Mismatch, likely_cause
from scalekd_ds.models.models_in_file import PREFIXES, choose_model
from scalekd_ds.models.weights_file import models_of, read_content

# buffers that follow from a model's shape or that evaluation does not read; older releases and averages saved them
_DERIVED_BUFFERS = (
    "relative_position_index",
    "attn_mask",
    "relative_coords_table",
    "num_batches_tracked",
    "n_averaged",
)

_POSITION_TABLES = ("pos_embed", "relative_position_bias_table")

# what MAE, SimMIM, BEiT, DINO, iBOT, SwAV, SimSiam and MoCo train beside the encoder that they are for
_TRAINING_PARTS = (
    *("decoder.", "decoder_", "mask_token", "dino_head.", "ibot_head.", "projection_head.", "prototypes."),
    *("predictor.", "projector.", "queue", "lm_head.", "AuxLogits."),
)

State = dict[str, torch.Tensor]
Head = Literal["exact", "file", "new"]


def load_weights(model: nn.Module, path: str | Path, head: Head = "exact") -> list[str]:
    """Loads every parameter of a timm model from a .safetensors, .pth or .pt file.

    Args:
        model: The model, whose `reset_classifier` is called for `head="file"`.
        path: The file. Its names may have a wrapper's prefix, or be mmpretrain's or of a release that timm converts.
        head: Which classifier the model ends up with. `exact`: its own, which the file must have. `file`: one with the
            file's number of classes, which may be none. `new`: the file's where it has the model's number of classes,
            else a newly initialised one, for fine-tuning.

    Returns:
        One line for each change on the way: which of several models was chosen, what was left out, resized or initialised
        anew.

    Raises:
        UserError: The file cannot be read (see `read_content`), or does not fit; the message has the first five names
            of each kind of difference, and what they suggest.
    """
    content = read_content(path)
    classifiers = tuple(f"{name}." for name in classifier_names(model)) if head != "exact" else ()
    state, notes = choose_model(models_of(content, path), model.state_dict(), path, classifiers)
    _check_values(state, path)
    # so that the position tables of half-precision files can be resized like any others
    state = {k: v.float() if v.is_floating_point() and v.itemsize < 4 else v for k, v in state.items()}
    state = strip_prefixes(state, model.state_dict(), path)
    state = _drop_derived_buffers(mmpretrain.to_timm(state, model.state_dict()), model)
    state = _without_training_parts(_apply_timm_filter(model, state, notes), model, notes)
    outputs = classes_of_file(model, state)
    state = _fit_head(model, state, head, notes)
    mismatch = Mismatch.between(state, model.state_dict())
    # files older than BatchNorm's count of batches lack it, and evaluation does not read it
    mismatch = mismatch.without_missing("num_batches_tracked")
    if mismatch:
        cause = likely_cause(mismatch, state, model.state_dict())
        raise UserError(f"{path} does not fit {type(model).__name__}: {mismatch}. {cause}")
    _check_kinds(state, model, path)
    model.load_state_dict(state, strict=False)
    if line := name_classes(model, path, content, outputs):
        notes.append(line)
    return notes


def _check_values(state: State, path: str | Path) -> None:
    """Raises UserError for a tensor that holds no values of its own."""
    for name, tensor in state.items():
        if tensor.is_meta:
            raise UserError(
                f"{path} has {name!r} without values (on torch's meta device): save the weights once loaded."
            )
        if tensor.is_quantized or tensor.layout is not torch.strided:
            kind = "quantised" if tensor.is_quantized else "sparse"
            raise UserError(f"{path} has {name!r} as a {kind} tensor: save the weights before that step.")


def _check_kinds(state: State, model: nn.Module, path: str | Path) -> None:
    """Raises UserError where numbers that are no weights, such as 8-bit codes or NaN, would become weights."""
    statistics = [(name, value) for name, value in model.named_buffers() if ".running_" in name]
    for name, ours in (*model.named_parameters(), *statistics):
        if name not in state or not ours.is_floating_point():
            continue
        if not state[name].is_floating_point():
            kind = str(state[name].dtype).removeprefix("torch.")
            raise UserError(
                f"{path} has {name!r} as {kind}: its scale is not known; save the weights before they are quantised."
            )
        if not state[name].isfinite().all():
            raise UserError(
                f"{path} has values in {name!r} that are not finite: its training diverged; take an earlier one."
            )


def strip_prefixes(state: State, model_names: Iterable[str], path: str | Path) -> State:
    """`state` without those prefixes of `PREFIXES` that no name of the model has.

    Where names start with `student.`, all others are dropped: a distiller's state also holds projectors and a teacher.

    Args:
        state: Tensors by name.
        model_names: Names of the model's parameters.
        path: The file, for the message.

    Raises:
        UserError: Two names would become the same.
    """
    model_names = list(model_names)
    changed = True
    while changed:
        changed = False
        for prefix in PREFIXES:
            if not any(k.startswith(prefix) for k in state) or any(k.startswith(prefix) for k in model_names):
                continue
            names = [k for k in state if k.startswith(prefix) or prefix != "student."]
            bare = {k: k.removeprefix(prefix) for k in names}
            if len(set(bare.values())) < len(bare):
                name = next(v for k, v in bare.items() if k != v and v in bare)
                raise UserError(f"{path} has {name!r} twice, also as {prefix + name!r}: keep one of the two models.")
            state, changed = {bare[k]: state[k] for k in names}, True
    return state


def _drop_derived_buffers(state: State, model: nn.Module) -> State:
    """`state` without the derived buffers that the model does not save."""
    model_state = model.state_dict()
    return {k: v for k, v in state.items() if k in model_state or not k.endswith(_DERIVED_BUFFERS)}


def _timm_filter(model: nn.Module) -> Callable[[State, nn.Module], State] | None:
    """timm's conversion of downloaded checkpoints for the model's family, or None where the family has none."""
    for cls in type(model).__mro__:
        if cls.__module__.startswith("timm.models."):
            found = getattr(sys.modules[cls.__module__], "checkpoint_filter_fn", None)
            if found is not None:
                return found
    return None


def _apply_timm_filter(model: nn.Module, state: State, notes: list[str]) -> State:
    """`state` after timm's filter, where it does not fit as it is; adds a note where position tables were resized."""
    convert, model_state = _timm_filter(model), model.state_dict()
    if convert is None or not Mismatch.between(state, model_state) or _patch_size_differs(state, model_state):
        return state
    options = {}
    if "adapt_layer_scale" in inspect.signature(convert).parameters:
        options["adapt_layer_scale"] = any("ls1.gamma" in k for k in model_state)
    try:
        converted = convert(dict(state), model, **options)
    # filters fail on names and shapes of another architecture, which `load_weights` then reports as differences
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, RuntimeError, AssertionError):
        return state
    converted = _drop_derived_buffers(converted, model)
    tables = [k for k in converted if k in state and k.endswith(_POSITION_TABLES)]
    # a table that still does not fit is no success to note, and is reported as a difference
    resized = [
        k
        for k in tables
        if converted[k].shape != state[k].shape and k in model_state and converted[k].shape == model_state[k].shape
    ]
    if resized:
        first, others = resized[0], len(resized) - 1
        notes.append(
            f"resized {first} from {_shape(state[first])} to {_shape(converted[first])} for another grid"
            + (f", and {others} more such tables" if others else "")
        )
    return converted


def _patch_size_differs(state: State, model_state: State) -> bool:
    """Whether the file has patches of another size: timm would resample their kernel, but it is a wrong model name."""
    name = "patch_embed.proj.weight"
    ours, loaded = model_state.get(name), state.get(name)
    return ours is not None and loaded is not None and loaded.dim() == 4 and ours.shape[2:] != loaded.shape[2:]


def _without_training_parts(state: State, model: nn.Module, notes: list[str]) -> State:
    """`state` without what self-supervised training has beside its encoder; a note says what that was."""
    model_state = model.state_dict()
    own = {name.split(".")[0] for name in model_state}
    extra = [name for name in state if name.startswith(_TRAINING_PARTS) and name.split(".")[0] not in own]
    if not extra:
        return state
    parts = dict.fromkeys(name.split(".")[0] for name in extra)
    notes.append(
        f"left out, as parts of its training alone: {', '.join(list(parts)[:5])}{', ...' if len(parts) > 5 else ''}"
    )
    return {name: value for name, value in state.items() if name not in extra}


def _fit_head(model: nn.Module, state: State, head: Head, notes: list[str]) -> State:
    """Makes the classifiers of model and `state` agree where `head` allows it, and notes how."""
    names = classifier_names(model)
    if not names:
        return state
    file_classes = classes_of_file(model, state)
    model_classes = int(getattr(model, "num_classes", 0) or 0)
    if file_classes == model_classes:
        return state
    prefixes = tuple(f"{name}." for name in names)
    if head == "file":
        reset_classifier(model, file_classes)
        if not file_classes:
            notes.append("it has no classifier: features only")
    elif model_classes == 0:
        state = {k: v for k, v in state.items() if not k.startswith(prefixes)}
        notes.append(f"its classifier of {file_classes} classes is left out, as num_classes is 0")
    elif head == "new":
        # auxiliary classifiers, such as VOLO's, are no part of what the model counts as its own
        others = {
            name
            for name, ours in model.state_dict().items()
            if name in state
            and state[name].shape[:1] == (file_classes,)
            and len(ours) == model_classes
            and "head" in name
        }
        fresh = {k: v for k, v in model.state_dict().items() if k.startswith(prefixes) or k in others}
        state = {**state, **fresh}
        notes.append(
            f"it has {file_classes or 'no'} classes: the classifier ({names[0]}) of {model_classes} starts fresh"
        )
    return state


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape))
