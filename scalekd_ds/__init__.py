"""scalekd_ds: distil huge vision transformers into models that ship (ScaleKD, NeurIPS 2024)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scalekd_ds.distiller import ScaleKD
    from scalekd_ds.student import Student
    from scalekd_ds.teacher import Teacher

__all__ = ["ScaleKD", "Student", "Teacher"]
__version__ = "0.1.0"

_HOMES = {"ScaleKD": "distiller", "Student": "student", "Teacher": "teacher"}


def __getattr__(name: str) -> Any:
    # torch and timm take seconds to import: a mistyped argument is answered without them
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"scalekd_ds.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'scalekd_ds' has no attribute {name!r}")
