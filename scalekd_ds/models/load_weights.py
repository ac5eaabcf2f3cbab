"""Fits weights from a file into a timm model: prefixes, layouts, position tables and heads, or one line that says why not.

In order: wrapper prefixes go, mmpretrain's names become timm's, timm's own filter of the model's family converts what it
knows (Microsoft's Swin, DINOv2, DINOv3, CLIP, ...) and resizes position tables, the classifier is settled, and what is
left must fit name by name.
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
from scalekd_ds.models.mismatch import Mismatch, reason
from scalekd_ds.models.weights_file import read_tensors

# of DistributedDataParallel, torch.compile, mmpretrain and other frameworks; and of distillers, which hold more than it
PREFIXES = ("module.", "_orig_mod.", "student.", "model.", "backbone.")

# buffers that follow from a model's shape, which older releases saved
_DERIVED = ("relative_position_index", "attn_mask", "relative_coords_table", "num_batches_tracked")

_POSITIONS = ("pos_embed", "relative_position_bias_table")

State = dict[str, torch.Tensor]
Head = Literal["exact", "file", "new"]


def load_weights(model: nn.Module, path: str | Path, head: Head = "exact") -> list[str]:
    """Loads a .safetensors, .pth or .pt file into a timm model, every parameter of it.

    Args:
        model: Its `reset_classifier` is called for `head="file"`.
        path: Names may have a wrapper's prefix, or be mmpretrain's or those of a first release that timm converts.
        head: Which classifier the model ends with: `exact` its own, which the file must have; `file` the file's number
            of classes, none included (a teacher that is named without classes); `new` the file's where it fits, else a
            fresh one (fine-tuning).

    Returns:
        One line for each thing that was changed on the way: what was unwrapped, resized or left fresh.

    Raises:
        UserError: The file is missing or damaged or needs code (`weights_file`), or does not fit: the first five names
            of each kind of difference, and what they suggest.
    """
    state, wrapper = read_tensors(path)
    notes = [f"took {wrapper!r}, of averaged weights"] if "ema" in wrapper else []
    state = strip_prefixes(state, model.state_dict(), path)
    state = _without_derived(mmpretrain.to_timm(state, model.state_dict()), model)
    state = _settle_head(model, _filtered(model, state, notes), head, notes)
    mismatch = Mismatch.between(state, model.state_dict())
    # BatchNorm's count of batches is younger than some files, and no evaluation reads it
    mismatch = mismatch.without_missing("num_batches_tracked")
    if mismatch:
        raise UserError(
            f"{path} does not fit {type(model).__name__}: {mismatch}. {reason(mismatch, state, model.state_dict())}"
        )
    model.load_state_dict(state, strict=False)
    return notes


def strip_prefixes(state: State, own: Iterable[str], path: str | Path) -> State:
    """Names without the prefixes in `PREFIXES` that the model's own names do not have.

    Under `student.` only what carries it is kept: a distiller's state holds projectors and a teacher too.

    Raises:
        UserError: Two names become one.
    """
    own = list(own)
    changed = True
    while changed:
        changed = False
        for prefix in PREFIXES:
            if not any(k.startswith(prefix) for k in state) or any(k.startswith(prefix) for k in own):
                continue
            names = [k for k in state if k.startswith(prefix) or prefix != "student."]
            bare = {k: k.removeprefix(prefix) for k in names}
            if len(set(bare.values())) < len(bare):
                twice = next(v for k, v in bare.items() if k != v and v in bare)
                raise UserError(f"{path} has {twice!r} twice, also as {prefix + twice!r}: keep one of the two models.")
            state, changed = {bare[k]: state[k] for k in names}, True
    return state


def _without_derived(state: State, model: nn.Module) -> State:
    own = model.state_dict()
    return {k: v for k, v in state.items() if k in own or not k.endswith(_DERIVED)}


def _timm_filter(model: nn.Module) -> Callable[[State, nn.Module], State] | None:
    """timm's conversion of released checkpoints of this family, which it applies to what it downloads."""
    for cls in type(model).__mro__:
        if cls.__module__.startswith("timm.models."):
            found = getattr(sys.modules[cls.__module__], "checkpoint_filter_fn", None)
            if found is not None:
                return found
    return None


def _filtered(model: nn.Module, state: State, notes: list[str]) -> State:
    convert, own = _timm_filter(model), model.state_dict()
    if convert is None or not Mismatch.between(state, own) or _other_patches(state, own):
        return state
    options = {}
    if "adapt_layer_scale" in inspect.signature(convert).parameters:
        options["adapt_layer_scale"] = any("ls1.gamma" in k for k in own)
    try:
        converted = convert(dict(state), model, **options)
    # a filter reads names and shapes that another architecture does not have: the comparison says which
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, RuntimeError, AssertionError):
        return state
    converted = _without_derived(converted, model)
    resized = [k for k in converted if k in state and k.endswith(_POSITIONS) and converted[k].shape != state[k].shape]
    # a table that still does not fit is reported as it was in the file
    resized = [k for k in resized if k in own and converted[k].shape == own[k].shape]
    if resized:
        first, others = resized[0], len(resized) - 1
        notes.append(
            f"resized {first} from {_shape(state[first])} to {_shape(converted[first])} for another grid"
            + (f", and {others} more such tables" if others else "")
        )
    return converted


def _other_patches(state: State, own: State) -> bool:
    # timm would resample the kernel of another patch size; here it is a mistake in the model's name
    name = "patch_embed.proj.weight"
    mine, theirs = own.get(name), state.get(name)
    return mine is not None and theirs is not None and theirs.dim() == 4 and mine.shape[2:] != theirs.shape[2:]


def classifier_names(model: nn.Module) -> list[str]:
    """Names of the modules that turn features into classes (DeiT's distilled ones have two), empty where unknown."""
    found = model.get_classifier() if hasattr(model, "get_classifier") else ()
    found = found if isinstance(found, tuple | list) else (found,)
    return [name for name, module in model.named_modules() if any(module is f for f in found)]


def _settle_head(model: nn.Module, state: State, head: Head, notes: list[str]) -> State:
    names = classifier_names(model)
    if not names:
        return state
    weight = state.get(f"{names[0]}.weight")
    theirs = 0 if weight is None else weight.shape[0]
    mine = int(getattr(model, "num_classes", 0) or 0)
    if theirs == mine:
        return state
    if head == "file":
        model.reset_classifier(theirs)
        if not theirs:
            notes.append("it has no classifier: features only")
    elif mine == 0:
        state = {k: v for k, v in state.items() if not k.startswith(tuple(f"{n}." for n in names))}
        notes.append(f"its classifier of {theirs} classes is left out, as num_classes is 0")
    elif head == "new":
        own = model.state_dict()
        fresh = {k: v for k, v in own.items() if k.startswith(tuple(f"{n}." for n in names))}
        state = {**state, **fresh}
        notes.append(f"it has {theirs or 'no'} classes: the classifier ({names[0]}) of {mine} starts fresh")
    return state


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape))
