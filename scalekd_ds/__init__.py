"""scalekd_ds distils huge vision transformers into models that ship (ScaleKD, NeurIPS 2024).

The modules of this folder are the method itself; they may use the folders that stand below them in the layers of
pyproject.toml, and no command, training loop or DeepSpeed engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scalekd_ds.distiller import ScaleKD
    from scalekd_ds.student import Student
    from scalekd_ds.teacher import Teacher

__all__ = ["ScaleKD", "Student", "Teacher"]
__version__ = "0.1.0"

# where each public name is defined
_MODULES = {"ScaleKD": "distiller", "Student": "student", "Teacher": "teacher"}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used."""
    # torch and timm take seconds to import, and a command that refuses a mistyped argument does not need them
    if name in _MODULES:
        from importlib import import_module

        return getattr(import_module(f"scalekd_ds.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'scalekd_ds' has no attribute {name!r}")
