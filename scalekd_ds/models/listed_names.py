"""Names of classes as other tools keep them: timm's and Hugging Face's config.json, and training scripts' checkpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from scalekd_ds.errors import UserError

# names by position come before their inverses, from which names that two classes share are lost
_BY_POSITION = ("label_names", "labels", "classes", "CLASSES", "class_names", "id2label", "idx_to_class")
_BY_NAME = ("label2id", "class_to_idx")
# where they lie deeper: timm's, mmpretrain's, Lightning's
_INSIDE = ("pretrained_cfg", "meta", "dataset_meta", "hyper_parameters")
# what transformers writes where nobody has named the classes
_UNNAMED = re.compile(r"LABEL_(\d+)")


def names_in(content: Mapping[Any, Any]) -> list[str] | None:
    """The names in the order of the outputs; None where there are none.

    Raises:
        UserError: There are, and they are no list of classes.
    """
    for key in (*_BY_POSITION, *_BY_NAME):
        if (names := as_list(content.get(key), key)) is not None:
            return names
    for key in _INSIDE:
        inner = content.get(key)
        if isinstance(inner, Mapping) and (names := names_in(inner)) is not None:
            return names
    return None


def as_list(value: Any, key: str) -> list[str] | None:
    """The names that a list, positions with names (in JSON as text), or names with positions stand for, in their order.

    None where nobody has named the classes, and for what is no such thing: `classes` may be their number.

    Args:
        value: What was found.
        key: Where it was found, for messages.

    Raises:
        UserError: A position has no name, or a name is no text.
    """
    if isinstance(value, Mapping) and value:
        by_name = key in _BY_NAME or not all(_position(position) is not None for position in value)
        if by_name and all(_position(place) is None for place in value.values()):
            # each name with its description, in the order of the outputs
            value = list(value)
        else:
            pairs = [(place, name) for name, place in value.items()] if by_name else list(value.items())
            by_place = {_position(place): name for place, name in pairs}
            missing = next((place for place in range(len(pairs)) if place not in by_place), None)
            if missing is not None:
                raise UserError(
                    f"{key} has {len(pairs)} names of classes, and none for class {missing}: they count from 0, without a gap."
                )
            value = [by_place[place] for place in range(len(pairs))]
    if not isinstance(value, list | tuple) or not value:
        return None
    if bad := [name for name in value if not isinstance(name, str | int) or isinstance(name, bool)]:
        raise UserError(f"{key} has {bad[0]!r:.60} as the name of a class: write a text.")
    names = list(map(str, value))
    unnamed = [_UNNAMED.fullmatch(name) for name in names]
    if all(found and int(found[1]) == place for place, found in enumerate(unnamed)):
        return None
    return names


def _position(value: Any) -> int | None:
    """A position in a list of classes, which JSON has as text where it is a key; None for anything else."""
    if isinstance(value, str) and value.isascii() and value.isdecimal():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
