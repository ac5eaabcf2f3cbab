"""Checks a DeepSpeed JSON key by key, before anything is started, by the table in `ds_keys`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hjson

from scalekd_ds.engine.ds_keys import KEYS, REFUSED, SECTIONS, SWITCHED_OFF, ZERO, Rule
from scalekd_ds.errors import UserError, suggest


def parse(path: Path) -> dict[str, Any]:
    """The JSON object in a file, which may have comments and commas before a bracket that closes, as DeepSpeed takes them.

    Raises:
        UserError: The file cannot be read, is no JSON, is no object, or has a key twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"{path} has the key {name!r} twice: keep one of them.")
        return dict(pairs)

    try:
        # some editors put a byte-order mark in front
        text = path.read_text(encoding="utf-8-sig")
        try:
            config = json.loads(text, object_pairs_hook=unique)
        except ValueError as error:
            config = _loosely(text, unique, error)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} holds a {type(config).__name__}: it must be a JSON object.")
    return config


def _loosely(text: str, unique: Callable[[list[tuple[str, Any]]], dict[str, Any]], error: ValueError) -> Any:
    """What DeepSpeed's own reader makes of a text that is not JSON; raises `error` where that is no object in braces."""
    try:
        # a list of `key: value` without braces would be one of YAML, which that reader reads otherwise
        found = hjson.loads(text, object_pairs_hook=unique) if "{" in text else None
    except (hjson.HjsonDecodeError, RecursionError):
        raise error from None
    if not isinstance(found, dict):
        raise error
    return found


def shown(value: Any) -> str:
    """A value as the JSON has it, cut where it is long."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def checked(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """The keys of a JSON that DeepSpeed gets: without "auto", sections that are off, and floats for whole numbers.

    Args:
        config: The JSON without the keys that the recipe sets.
        path: Its file, for messages.

    Raises:
        UserError: A key is unknown, or has another value than a run can take; the message says what to write instead.
    """
    stage = _stage(config, path)
    for key, value in _leaves(config, path):
        _check_value(key, value, KEYS[key], stage, path)
    found = _without_auto({k: v for k, v in config.items() if k not in SWITCHED_OFF}, "")
    _check_together(found, stage, path)
    return found


def _stage(config: dict[str, Any], path: Path) -> int:
    zero = config.get(ZERO, {})
    stage = zero.get("stage", 0) if isinstance(zero, dict) else 0
    _check_value(f"{ZERO}.stage", stage, KEYS[f"{ZERO}.stage"], 0, path)
    return stage


def _leaves(config: dict[str, Any], path: Path, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of each key that has a rule; refuses the others."""
    for name, value in config.items():
        key = prefix + name
        if "." in name:
            # as the keys are named here, and which DeepSpeed would skip
            inside = ": {".join(json.dumps(part) for part in name.split("."))
            raise UserError(f"{path}: DeepSpeed does not know the key {key!r}: write {inside}: ...")
        if key in REFUSED:
            raise UserError(f"{path}: {key} has no place in a run: {REFUSED[key]}. Remove it.")
        if key in SWITCHED_OFF:
            _check_off(key, value, path)
        elif key in SECTIONS:
            if not isinstance(value, dict):
                raise UserError(f"{path}: {key} is {shown(value)}: it must be an object, or be left out.")
            yield from _leaves(value, path, f"{key}.")
        elif key in KEYS:
            yield key, value
        else:
            _refuse_removed(key, path)
            beside = [
                k.removeprefix(prefix) for k in (*KEYS, *REFUSED, *SECTIONS, *SWITCHED_OFF) if k.startswith(prefix)
            ]
            hint = suggest(name, sorted({k.split(".")[0] for k in beside}))
            raise UserError(f"{path}: DeepSpeed does not know the key {key!r}.{hint}")


def _refuse_removed(key: str, path: Path) -> None:
    """Refuses what older releases of DeepSpeed had, with its own words."""
    from deepspeed.runtime import config as deepspeed_config

    top = getattr(deepspeed_config, "_REMOVED_TOP_LEVEL_CONFIG_KEYS", {})
    removed = top | {f"{ZERO}.{k}": v for k, v in getattr(deepspeed_config, "_REMOVED_ZERO_CONFIG_KEYS", {}).items()}
    if key in removed:
        raise UserError(f"{path}: {key} is none of DeepSpeed's keys any more: {removed[key]} Remove it.")


def _check_off(key: str, value: Any, path: Path) -> None:
    if not isinstance(value, dict):
        raise UserError(f"{path}: {key} is {shown(value)}: it must be an object, or be left out.")
    enabled = value.get("enabled", False)
    if enabled is not False:
        raise UserError(f"{path}: {key}.enabled is {shown(enabled)}: it must be false. {SWITCHED_OFF[key]}.")


def _check_value(key: str, value: Any, rule: Rule, stage: int, path: Path) -> None:
    automatic = value == "auto" and rule.auto
    if not automatic and not rule.fits(value):
        advice = f"; {rule.advice}" if rule.advice else ""
        raise UserError(f"{path}: {key} is {shown(value)}: it must be {rule.expected}{advice}.")
    if stage not in rule.stages and value != rule.idle:
        stages = " or ".join(map(str, rule.stages))
        raise UserError(f"{path}: {key} has no effect at ZeRO stage {stage}, only at {stages}: remove it.")


def _without_auto(section: dict[str, Any], prefix: str) -> dict[str, Any]:
    """A copy whose keys that are "auto" or null are left to DeepSpeed's defaults, and whose 1e9 are whole numbers."""
    found: dict[str, Any] = {}
    for name, value in section.items():
        if isinstance(value, dict):
            found[name] = _without_auto(value, f"{prefix}{name}.")
        elif value not in ("auto", None):
            whole = isinstance(value, float) and "number from" in KEYS[prefix + name].expected
            found[name] = int(value) if whole else value
    return found


def _check_together(config: dict[str, Any], stage: int, path: Path) -> None:
    """Refuses keys of which one makes another without effect."""

    def refuse(key: str, why: str) -> None:
        raise UserError(f"{path}: {key} has no effect {why}.")

    zero = config.get(ZERO, {})
    for name in ("offload_optimizer", "offload_param"):
        if zero.get(name) and "device" not in zero[name]:
            refuse(f"{ZERO}.{name}", 'without "device": "cpu" in it')
    for name in zero:
        if f"stage3_{name}" in zero:
            refuse(f"{ZERO}.{name}", f"beside stage3_{name}, which is the same: keep one of them")
    sequential = zero.get("stage3_allgather_sequential", zero.get("allgather_sequential"))
    for name in ("stage3_prefetch_bucket_size", "prefetch_bucket_size"):
        if sequential and name in zero:
            refuse(f"{ZERO}.{name}", "beside stage3_allgather_sequential, which fetches parameters singly: remove one")
    for name, idle in (("prescale_gradients", False), ("gradient_predivide_factor", 1)):
        if stage and zero.get("reduce_scatter", True) and config.get(name, idle) != idle:
            refuse(name, f'at ZeRO stage {stage} without "reduce_scatter": false in {ZERO}')
    if config.get("prescale_gradients") and config.get("gradient_predivide_factor", 1) != 1:
        refuse("gradient_predivide_factor", "beside prescale_gradients: remove one of them")
    if config.get("torch_autocast", {}).get("enabled") and stage and "communication_data_type" in config:
        refuse("communication_data_type", "beside torch_autocast, whose dtype is sent under ZeRO: remove it")
    if config.get("dump_state") and config.get("log_level") not in ("debug", "info"):
        refuse("dump_state", 'without "log_level": "info", at which DeepSpeed writes the state to its log')
