"""Reads a `RunConfig` from command line options and from JSON files."""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from argparse import ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from scalekd_ds.config import RunConfig
from scalekd_ds.errors import UserError, suggest
from scalekd_ds.names import paths_in


class _HelpFormatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Shows types and defaults as jsonargparse does, and keeps the lines of the examples in the epilog."""


def run_parser(
    prog: str, extend: Callable[[ArgumentParser], None] | None = None, epilog: str | None = None
) -> ArgumentParser:
    """The parser of a run's options: a file to start from, and every field of `RunConfig`, in groups.

    Args:
        prog: Name of the command in messages.
        extend: Adds the command's own options, before those of the run.
        epilog: Text below the options.
    """
    parser = ArgumentParser(
        prog=prog,
        usage=f"{prog} [--recipe NAME | --config FILE] [--dotted.key value ...]",
        exit_on_error=False,
        # options of the launcher are found by their full names: a shortened one would be accepted and start none
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
        description="Distil a frozen vision transformer into any timm student with ScaleKD, or train\n"
        "without a teacher. What most runs need, and examples, are at the end.",
        epilog=epilog,
    )
    # torch.distributed.launch writes it with a hyphen
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help="set by launchers")
    parser.add_argument("--list-recipes", action="store_true", help="print the recipes and exit")
    parser.add_argument("--dump-config", type=str, metavar="FILE", help="write the whole run as JSON and exit")
    parser.add_argument("--config", type=str, metavar="FILE", help="start from a --dump-config file, not a recipe")
    if extend is not None:
        extend(parser)
    parser.add_class_arguments(RunConfig)
    for name, group in (parser.groups or {}).items():
        ungrouped = "the models, their loss and batch; the groups below are the rest of a run"
        group.title = f"--{name}.*: {group.title}" if name in RunConfig.__dataclass_fields__ else ungrouped
    return parser


def _long_flags(parser: ArgumentParser) -> list[str]:
    flags = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
    # those that a launcher sets are no advice
    return [flag for flag in flags if flag not in ("--local_rank", "--local-rank")]


def _unknown(flag: str, parser: ArgumentParser) -> str:
    """The message for an argument that there is not; one that differs in its group alone is what was meant."""
    flags = _long_flags(parser)
    # what scripts with DeepSpeed's own arguments call it
    last = "ds_config" if flag == "--deepspeed" else flag.rpartition(".")[2].lstrip("-").replace("-", "_")
    same = [known for known in flags if known.rpartition(".")[2] == last]
    hint = f" Did you mean {', '.join(map(repr, same))}?" if same else suggest(flag, flags)
    return f"unknown argument {flag!r}.{hint} --help lists them all."


def describe_error(error: ArgumentError, parser: ArgumentParser) -> str:
    """jsonargparse's error as one line in the form of this package's messages."""
    message = str(error)
    if unknown := re.search(r"unrecognized arguments: (\S+)", message):
        return _unknown(unknown[1].split("=", 1)[0], parser)
    key = re.search(r'Parser key "([^"]+)"', message)
    value = re.search(r"(?:Given value|Got value): (.*)", message)
    expected = re.findall(r"Expected an? (.*?)(?:\. |$)", message, re.M)
    if key and value and (nested := re.search(r"NestedArg\(key='([^']*)'", value[1])):
        return _unknown(f"--{key[1]}.{nested[1]}", parser)
    if key and value:
        kinds = (re.sub(r"<class '(\w+)'>", r"\1", e).replace("typing.Literal", "one of ") for e in expected)
        wants = " or ".join(dict.fromkeys(kinds)) or "of its type"
        return f"--{key[1]} is {value[1]!r}: it must be {wants}."
    return " ".join(message.split())


def config_from_dict(values: dict[str, Any], source: str) -> RunConfig:
    """A RunConfig from plain nested data, checked as the command line is.

    Args:
        values: What `RunConfig.as_dict` returned, or a part of it.
        source: Where the values are from, for the messages.

    Raises:
        UserError: An unknown key or a value that its field cannot have.
    """
    if not isinstance(values, dict):
        raise UserError(
            f"{source} holds a {type(values).__name__}: it must be a JSON object, as --dump-config writes it."
        )
    _check_names(values, source)
    values = paths_in(values)
    parser = run_parser("config")
    try:
        parsed = parser.parse_object(values)
    except ArgumentError as error:
        raise UserError(f"{source}: {describe_error(error, parser)}") from None
    try:
        return instantiate(parser, parsed)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def _check_names(values: dict[str, Any], source: str) -> None:
    """Refuses unknown keys, because jsonargparse ignores an unknown key whose value is an empty object."""
    groups = {field.name: field.default_factory for field in dataclasses.fields(RunConfig)}
    for name, value in values.items():
        if name not in groups:
            raise UserError(f"{source}: unknown key {name!r}.{suggest(name, groups)}")
        group: Any = groups[name]
        if not dataclasses.is_dataclass(group) or not isinstance(value, dict):
            continue
        known = [field.name for field in dataclasses.fields(group)]
        for key in value:
            if key not in known:
                raise UserError(f"{source}: unknown key {f'{name}.{key}'!r}.{suggest(key, known)}")


def read_config(path: Path) -> RunConfig:
    """Reads a run from a file that --dump-config wrote.

    Raises:
        UserError: The file is missing, is not JSON, or has an unknown key or a value that its field cannot have.
    """
    if not path.is_file():
        raise UserError(f"config file {str(path)!r} does not exist.")
    try:
        # some editors put a byte-order mark in front
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UserError(f"config file {path} is not JSON: {error}.") from None
    return config_from_dict(values, str(path))


def _check_values(parsed: Namespace, owner: Any, prefix: str) -> None:
    """Refuses what jsonargparse lets through: null for any field, and a plain value for a group of fields.

    Args:
        parsed: Values of the fields of `owner`.
        owner: Dataclass of the fields.
        prefix: What stands before the fields' names in messages: "data." for those of `--data.*`.
    """
    for name, kind in typing.get_type_hints(owner).items():
        value = parsed[name]
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, Namespace):
                raise UserError(f"--{name} is {value!r}: it must be an object with the fields of --{name}.*.")
            _check_values(value, kind, f"{name}.")
        elif value is None and type(None) not in typing.get_args(kind):
            raise UserError(f"--{prefix}{name} is null: it must have a value.")


def instantiate(parser: ArgumentParser, parsed: Namespace) -> RunConfig:
    """Makes a RunConfig of what a parser of `run_parser` has parsed.

    Raises:
        UserError: A value that its field cannot have.
    """
    _check_values(parsed, RunConfig, "")
    values = parser.instantiate(parsed)
    fields = {name: values[name] for name in RunConfig.__dataclass_fields__}
    return RunConfig(**fields)
