"""Which of the tensors in a file are the model: trainers wrap it, and keep averages, losses and other models beside it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from scalekd_ds.errors import UserError

State = dict[str, torch.Tensor]

# put before names by DistributedDataParallel, torch.compile, mmpretrain and other frameworks, and by distillers
PREFIXES = ("module.", "_orig_mod.", "student.", "model.", "backbone.")

# put into the midst of names where a part of a model is compiled, checkpointed or sharded by itself
WRAPPED_PARTS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.", "_forward_module.")

# keys under which training scripts keep the model, in the order in which they are taken; averages come before them
_KEYS = ("state_dict", "model_state_dict", "model", "net", "network", "student", "module", "weights", "params")
_AVERAGES = ("ema", "swa", "average")
_NO_MODELS = ("optim", "sched", "scaler", "rng", "args", "config", "hyper", "callback")

# dicts lie at most this deep in dicts of any known trainer, and what a pickle holds may contain itself
_DEPTH = 4


class Candidate(NamedTuple):
    """Tensors that may be the model.

    Attributes:
        keys: The keys of nested dicts that lead to them.
        prefix: What their names in the file begin with, and `state` has without; empty where all names are taken.
        state: The tensors by name.
        beside: What else stands in the same dict where there is a `prefix`.
    """

    keys: tuple[str, ...]
    prefix: str
    state: State
    beside: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = repr(".".join(self.keys)) if self.keys else ""
        if not self.prefix:
            return where or "the file's own names"
        return f"the names that start with {self.prefix!r}" + (f" in {where}" if where else "")

    @property
    def is_average(self) -> bool:
        """Whether its names say that it is an average of weights."""
        return any(map(_names_average, (*self.keys, *self.prefix.strip(".").split("."))))

    @property
    def rank(self) -> tuple[int, ...]:
        """Its place among several: averages, then by `_KEYS`, then what has no known key; by its keys before its prefix."""

        def place(word: str) -> int:
            return _KEYS.index(word) if word in _KEYS else len(_KEYS)

        prefix = self.prefix.strip(".").split(".")
        # within an average's wrapper, `ema_model` comes before `online_model`
        last = not _names_average(prefix[-1]) if self.is_average and len(prefix) > 1 else 0
        return not self.is_average, min(map(place, self.keys), default=len(_KEYS)), *map(place, prefix), last


def _names_average(word: str) -> bool:
    return word.lower().startswith(_AVERAGES) or word.lower().endswith(_AVERAGES)


def models_in(content: Mapping[Any, Any]) -> list[Candidate]:
    """Every dict of tensors in nested dicts but those that optimizers, schedules and configurations keep."""
    found: list[Candidate] = []

    def visit(mapping: Mapping[Any, Any], keys: tuple[str, ...]) -> None:
        if "param_groups" in mapping:
            # an optimizer, under whatever key
            return
        tensors = {str(name): value for name, value in mapping.items() if isinstance(value, torch.Tensor)}
        if tensors:
            found.append(Candidate(keys, "", tensors))
        for key, value in mapping.items():
            other = any(word in str(key).lower() for word in _NO_MODELS)
            if isinstance(value, Mapping) and not other and len(keys) < _DEPTH:
                visit(value, (*keys, str(key)))

    visit(content, ())
    return found


def choose_model(
    models: list[Candidate], model_names: Collection[str], path: str | Path, classifiers: tuple[str, ...] = ()
) -> tuple[State, list[str]]:
    """The tensors of the one model in a file that is meant: of those whose names fit best, averaged weights come first.

    Args:
        models: What `models_in` found, at least one.
        model_names: Names of the parameters and buffers of the model that is loaded into.
        path: The file, for the message.
        classifiers: How the names of the model's classifiers begin. Where no model in the file has them, as a self-supervised
            encoder has none, the rest decides.

    Returns:
        The tensors by name; and one line if they are averaged weights, a part of the names, or one model of several.

    Raises:
        UserError: Several models fit, and nothing tells which one is meant.
    """
    models = [model._replace(state=_without_wrapped_parts(model.state, model_names)) for model in models]
    needed = {name for name in model_names if not name.endswith("num_batches_tracked")}
    candidates, fits = _candidates(models, needed)
    if classifiers and max(fits.values()) < 1.0:
        without = {name for name in needed if not name.startswith(classifiers)}
        others, fits_of_others = _candidates(models, without)
        if without and max(fits_of_others.values()) == 1.0:
            candidates, fits = others, fits_of_others
    best = [c for c in candidates if fits[id(c)] >= 0.9 * max(fits.values())]
    best.sort(key=lambda c: (*c.rank, -len(c.state)))
    chosen = best[0]
    # where no name fits, the file has another layout, and its largest dict is the model
    rivals = [c for c in best[1:] if fits[id(c)] > 0.5]
    if rivals and chosen.rank == rivals[0].rank:
        raise UserError(
            f"{path} holds several models ({', '.join(str(c) for c in (chosen, *rivals))}), and nothing says which one is "
            "meant: save it by itself."
        )
    left_out = [*chosen.beside, *(str(c) for c in rivals if c.keys != chosen.keys or not chosen.prefix)]
    if not (chosen.prefix or chosen.is_average or rivals):
        return chosen.state, []
    average = ", of averaged weights" if chosen.is_average else ""
    beside = f"; left out: {', '.join(left_out[:5])}{', ...' if len(left_out) > 5 else ''}" if left_out else ""
    return chosen.state, [f"took {chosen}{average}{beside}"]


def _candidates(models: list[Candidate], needed: set[str]) -> tuple[list[Candidate], dict[int, float]]:
    """Models and parts of them, and the share of the names that each has, by its id."""
    found = [part for model in models for part in _parts(model, needed) or [model]]
    return found, {id(c): len(needed & {*c.state, *map(_bare, c.state)}) / max(1, len(needed)) for c in found}


def _parts(model: Candidate, needed: set[str]) -> list[Candidate]:
    """Each first part of the names under which the whole model stands; none where all names belong to one model.

    torch's AveragedModel has `module.` beside `n_averaged`, other averages `ema_model.` beside `online_model.`.
    """
    if needed <= model.state.keys():
        return []
    groups: dict[str, State] = {}
    for name, tensor in model.state.items():
        first, dot, rest = name.partition(".")
        groups.setdefault(first + dot, {})[rest] = tensor
    whole = {prefix: group for prefix, group in groups.items() if needed <= set(map(_bare, group))}
    if not whole or (len(groups) == 1 and next(iter(groups)) in PREFIXES):
        # behind DistributedDataParallel's name, or a trainer's, may be several models, such as a student and its teacher
        return [
            part._replace(prefix=first + part.prefix, beside=(*part.beside, *_besides(groups, first)))
            for first, group in groups.items()
            if len(group) >= len(needed)
            for part in _parts(Candidate(model.keys, "", group), needed)
        ]
    return [Candidate(model.keys, prefix, group, _besides(groups, prefix)) for prefix, group in whole.items()]


def _besides(groups: Mapping[str, State], taken: str) -> tuple[str, ...]:
    return tuple(repr(other) for other in groups if other != taken)


def _without_wrapped_parts(state: State, model_names: Collection[str]) -> State:
    """The tensors without those of `WRAPPED_PARTS` in the midst of their names that no name of the model has."""
    words = [word for word in WRAPPED_PARTS if not any(word in name for name in model_names)]
    inside = re.compile(rf"(?<=\.)({'|'.join(map(re.escape, words))})") if words else None
    renamed = {inside.sub("", name) if inside else name: tensor for name, tensor in state.items()}
    # two names that would become one stay as they are
    return renamed if len(renamed) == len(state) else state


def _bare(name: str) -> str:
    """A name without any of `PREFIXES` in front."""
    while found := next((prefix for prefix in PREFIXES if name.startswith(prefix)), None):
        name = name.removeprefix(found)
    return name
