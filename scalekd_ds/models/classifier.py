"""The part of a timm model that turns features into logits, which may have several layers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def classifier_names(model: Any) -> list[str]:
    """Names of the modules that turn features into logits: two in a distilled DeiT, none where a model has none."""
    classifiers = model.get_classifier() if hasattr(model, "get_classifier") else ()
    classifiers = classifiers if isinstance(classifiers, tuple | list) else (classifiers,)
    return [name for name, module in model.named_modules() if any(module is c for c in classifiers)]


def classes_of_file(model: nn.Module, state: Mapping[str, torch.Tensor]) -> int:
    """The number of classes of a file by the weights of its classifier; 0 where it has none.

    Most are one layer. LeViT's has a norm before it, MetaFormer's a layer, and CrossViT has one for each of its branches.

    Args:
        model: The model that the file is for.
        state: Its weights, under the model's names.
    """
    own = model.state_dict()
    for classifier in classifier_names(model):

        def weights(tensors: Mapping[str, torch.Tensor], prefix: str = f"{classifier}.") -> list[str]:
            return [name for name, value in tensors.items() if name.startswith(prefix) and value.dim() > 1]

        # a model without classes does not have these layers
        names = [name for name in weights(own) or weights(state) if name in state]
        if names:
            return state[names[-1]].shape[0]
    return 0


def reset_classifier(model: Any, classes: int) -> None:
    """Gives a model a new classifier of so many classes, with as many parts as it had: RepViT would lose its second one."""
    own = inspect.signature(model.reset_classifier).parameters
    second = {"distillation": any(".head_dist." in k for k in model.state_dict())} if "distillation" in own else {}
    model.reset_classifier(classes, **second)
