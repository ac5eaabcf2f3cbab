"""Builds a model whose weights take no memory, and whose buffers are real."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._pytree import tree_map


class _Blank(nn.Parameter):
    """A parameter on the meta device that says it is on the one it was made on, where timm then makes a module's buffers.

    What initialises it runs on the meta device, and computes nothing.
    """

    said: torch.device
    plain: torch.Tensor

    @classmethod
    def of(cls, parameter: nn.Parameter) -> _Blank:
        """One in the shape of a parameter."""
        plain = parameter.detach().to("meta")
        found = cls(plain, requires_grad=False)
        found.said, found.plain = parameter.device, plain
        return found

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where it would be."""
        return self.said

    def __deepcopy__(self, memo: Any) -> _Blank:
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(lambda t: t.plain if isinstance(t, cls) else t, (args, kwargs or {}))
        return func(*args, **kwargs)


def build_without_weights(build: Callable[[], nn.Module]) -> nn.Module:
    """What `build` returns, with the weights of its linear layers and convolutions on the meta device.

    These are nearly all of a model's weights. Its other parameters and its buffers are real: timm computes some of the latter
    at construction, such as masks, indices and rotary tables, which a model on the meta device would lack. Modules that other
    threads build meanwhile are left alone.
    """
    builder = threading.get_ident()

    def blank(module: nn.Module, _: str, parameter: Any) -> Any:
        if threading.get_ident() != builder or not isinstance(module, nn.Linear | _ConvNd) or parameter is None:
            return None
        return _Blank.of(parameter)

    handle = register_module_parameter_registration_hook(blank)
    try:
        model = build()
    finally:
        handle.remove()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, _Blank):
                module._parameters[name] = nn.Parameter(parameter.plain, requires_grad=False)
    return model
