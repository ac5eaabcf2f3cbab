"""Compares two lists of class names, and maps one onto the other by name.

Classes are names; their order is chosen by whoever lists them. `0` to `K-1` in this order are the names of classes that
have none, as labels that are numbers give them.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from scalekd_ds.errors import UserError, suggest
from scalekd_ds.names import escape

_NUMBER = re.compile(r"[0-9]{1,9}")


class KnownClasses(NamedTuple):
    """The names of a model's classes.

    Attributes:
        schemes: Lists of names, each in the order of the model's outputs; several where the classes go by several kinds of
            names, such as WordNet's numbers and words; none where nothing is known.
        certain: Whether they were read beside the weights, and not guessed from the number of classes.
        guessed_for_file: Whether they are a guess for a file of weights of any origin, which has to be said.
    """

    schemes: tuple[list[str], ...] = ()
    certain: bool = True
    guessed_for_file: bool = False


class Matched(NamedTuple):
    """How the classes of data are found among a model's outputs.

    Attributes:
        positions: (classes of the data,) int64 output of each class.
        notice: What a user should know, in one line, or None.
        by_name: Whether names decided, and not the order alone.
    """

    positions: np.ndarray
    notice: str | None
    by_name: bool

    @property
    def same_order(self) -> bool:
        """Whether each class has its own position."""
        return bool((self.positions == np.arange(len(self.positions))).all())


def are_numbers(names: Sequence[str]) -> bool:
    """Whether the classes have no names: they are `0` to `K-1` in this order, with zeros in front or not."""
    return all(_NUMBER.fullmatch(name) and int(name) == position for position, name in enumerate(names))


def natural_order(names: Sequence[str]) -> list[str]:
    """The names sorted with runs of digits as numbers, so that `2` comes before `10`, as timm's own reader sorts."""

    def parts(name: str) -> list[tuple[int, int, str]]:
        # a pair for each run, since numbers and text do not compare
        found = re.findall(r"(\d+)|(\D+)", name.lower(), re.ASCII)
        return [(0, int(digits), "") if digits else (1, 0, text) for digits, text in found]

    return sorted(names, key=lambda name: (parts(name), name))


def positions_in(names: Sequence[str], where: Sequence[str]) -> np.ndarray:
    """(names,) int64 position of each name in `where`, -1 where it is not there.

    Letters with accents are the same in both of Unicode's forms: file systems store what they were given. So is a name that is
    escaped on one side: a list of lines cannot have all names otherwise.
    """
    known = {name: position for position, name in enumerate(where)}
    found = [known.get(name, -1) for name in names]
    taken = set(found)
    if -1 in taken:
        forms: dict[str, int] = {}
        for form in (lambda name: unicodedata.normalize("NFC", name), escape):
            for position, name in enumerate(where):
                forms.setdefault(form(name), position)
        for i, name in enumerate(names):
            wanted = (name, unicodedata.normalize("NFC", name), escape(name))
            other = next((forms[form] for form in wanted if form in forms), -1) if found[i] < 0 else -1
            # two names of the same data are two classes, however like they are
            if other not in taken:
                found[i] = other
                taken.add(other)
    return np.array(found, dtype=np.int64)


def match_classes(
    known: KnownClasses, outputs: int, data: Sequence[str], model_is: str, data_is: str, subset: bool = False
) -> Matched:
    """Finds each class of some data among the outputs of a model: by name, or by order where one of them has no names.

    Args:
        known: The names of the model's classes.
        outputs: Number of its outputs.
        data: Names of the data's classes.
        model_is: The model, for messages.
        data_is: The data, for messages.
        subset: The data may have some of the model's classes only.

    Raises:
        UserError: The data have a class that the model has not, or lack one; the message has the first of them.
    """
    for scheme in known.schemes:
        positions = positions_in(data, scheme)
        # words may stand for two classes, such as a bird and a machine that are both a crane
        found = (positions >= 0).all() and len(np.unique(positions)) == len(data)
        if found and (len(data) == len(scheme) or subset):
            notice = _other_order(positions, scheme, data, model_is, data_is)
            if known.guessed_for_file:
                notice = f"{model_is} has no class names: its {outputs} outputs are taken for ImageNet's in their usual order"
            return Matched(positions, notice, True)
    if not known.certain and any(is_almost(data, scheme) for scheme in known.schemes):
        return Matched(np.arange(len(data)), None, True)
    # a guess that shares no name with the data is of other names for the same classes, or of other classes
    schemes = [s for s in known.schemes if known.certain or (positions_in(data, s) >= 0).any()]
    nameless = not schemes or are_numbers(data) or all(are_numbers(scheme) for scheme in schemes)
    if nameless and len(data) == outputs:
        return Matched(np.arange(len(data)), _assumed_order(schemes, data, model_is, data_is), False)
    if nameless:
        raise UserError(f"{model_is} has {outputs} classes and {data_is} {len(data)}: they must be the same.")
    scheme = max(schemes, key=lambda names: int((positions_in(data, names) >= 0).sum()))
    unknown = [name for name, position in zip(data, positions_in(data, scheme), strict=True) if position < 0]
    missing = [name for name, position in zip(scheme, positions_in(scheme, data), strict=True) if position < 0]
    parts = []
    if unknown:
        parts.append(f"{len(unknown)} only in {data_is}, the first {unknown[0]!r}{suggest(unknown[0], scheme)}")
    if missing:
        parts.append(f"{len(missing)} only in {model_is}, the first {missing[0]!r}")
    raise UserError(f"{data_is} and {model_is} have different classes: {'; '.join(parts)}.")


def is_almost(data: Sequence[str], scheme: Sequence[str]) -> bool:
    """Whether nearly all names are those at the same positions: ImageNet's words have several spellings."""
    return len(data) == len(scheme) and sum(map(str.__eq__, data, scheme)) > 0.9 * len(data)


def _other_order(
    positions: np.ndarray, scheme: Sequence[str], data: Sequence[str], model_is: str, data_is: str
) -> str | None:
    """The line that says that names were matched across two orders; None where the order is the same."""
    if len(data) < len(scheme):
        return f"{data_is} has {len(data)} of the {len(scheme)} classes of {model_is}: they are matched by name"
    moved = np.flatnonzero(positions != np.arange(len(data)))
    if not len(moved):
        return None
    first = int(moved[0])
    return (
        f"{data_is} and {model_is} list the same classes in another order (class {first} is {data[first]!r} and "
        f"{scheme[first]!r}): they are matched by name"
    )


def _assumed_order(schemes: Sequence[Sequence[str]], data: Sequence[str], model_is: str, data_is: str) -> str | None:
    """The line that says which order is taken where one side has no names."""
    if schemes and not are_numbers(schemes[0]):
        names = schemes[0]
        return (
            f"the labels of {data_is} are numbers: they are positions in the classes of {model_is} (0 is {names[0]!r})"
        )
    if are_numbers(data):
        # numbers on both sides: there is nothing else that they could mean
        return (
            None if schemes else f"{model_is} has no class names: output 0 is taken for label 0 of {data_is}, and so on"
        )
    return (
        f"{model_is} has no class names: its outputs are taken in the order of the classes of {data_is} (0 is "
        f"{data[0]!r}, {len(data) - 1} is {data[-1]!r})"
    )
