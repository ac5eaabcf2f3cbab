"""The check that every field of a configuration goes through."""

from __future__ import annotations

from typing import Any

from scalekd_ds.errors import UserError


def require(holds: bool, key: str, value: Any, need: str) -> None:
    """Raises a UserError unless a condition holds.

    Args:
        holds: The condition.
        key: Dotted name of the field, for the message.
        value: Its value, for the message.
        need: What the value must be, completing "it must be ...".
    """
    if not holds:
        raise UserError(f"{key} is {value!r}: it must be {need}.")
