"""One check of a field."""

from __future__ import annotations

from typing import Any

from scalekd_ds.errors import UserError


def require(holds: bool, key: str, value: Any, need: str) -> None:
    """Raises a UserError that names the field, its value and what it must be, unless it `holds`."""
    if not holds:
        raise UserError(f"{key} is {value!r}: it must be {need}.")
