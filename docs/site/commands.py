"""Writes docs/commands.md, the reference of the command line, from the parsers themselves: `make commands`."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import typing
from pathlib import Path
from typing import Any

from scalekd_ds.commands.parser import Parser
from scalekd_ds.commands.verbs import VERBS, module_of
from scalekd_ds.config import RunConfig
from scalekd_ds.config.parser import run_parser

HEAD = """# scalekd commands

Every verb of `scalekd`, with its arguments. `scalekd VERB --help` prints the same in the terminal. `python launch/VERB.py`
is the same command from a checkout, and `deepspeed launch/train.py` starts `scalekd train` on several ranks or
nodes ([cluster](cluster.md)). This page is written from the parsers by `make commands`.
"""


def cell(text: str) -> str:
    """Text as it can stand in a cell of a table, on one line."""
    return re.sub(r"<(?=[a-zA-Z/])", "&lt;", " ".join(text.split()).replace("|", "\\|"))


def shown(value: Any) -> str:
    """A default as it would be typed; nothing where there is none."""
    if value is None or value is argparse.SUPPRESS or value == "":
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, list | tuple):
        return f"`{' '.join(map(str, value))}`" if value else ""
    if isinstance(value, dict):
        return f"`{value}`" if value else ""
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def kind_of(hint: Any) -> str:
    """A type as a reader of flags wants it: words to choose from, a number, or a text."""
    if typing.get_origin(hint) is typing.Literal:
        return " ".join(f"`{choice}`" for choice in typing.get_args(hint))
    if hint is None or hint is type(None):
        return "`null`"
    parts = typing.get_args(hint)
    if type(None) in parts:
        return " or ".join(kind_of(part) for part in (*(p for p in parts if p is not type(None)), None))
    return cell(getattr(hint, "__name__", str(hint)) if not parts else str(hint)).replace("typing.", "")


def row(action: argparse.Action) -> str:
    """The row of one argument: how it is written, its default and its help."""
    if action.option_strings:
        long = [flag for flag in action.option_strings if flag.startswith("--")] or action.option_strings
        name = f"`{long[0]}`" + "".join(f", `{flag}`" for flag in action.option_strings if flag not in long)
        takes_value = action.nargs != 0
        default = shown(action.default) if takes_value else ""
    else:
        name, default = f"`{action.metavar or action.dest}`", ""
    words = cell((action.help or "").replace("%%", "%"))
    if action.choices and not isinstance(action.choices, dict):
        words = f"{words}{': ' if words else ''}{' '.join(f'`{choice}`' for choice in action.choices)}"
    if action.required and action.option_strings:
        words = f"{words} (required)"
    return f"| {name} | {default} | {words} |"


def table(actions: list[argparse.Action]) -> list[str]:
    """The rows of several arguments under their head; nothing for none."""
    rows = [row(action) for action in actions if action.help != argparse.SUPPRESS and action.dest != "help"]
    return ["", "| argument | default | what it is |", "|---|---|---|", *rows] if rows else []


def subcommands(parser: argparse.ArgumentParser) -> list[str]:
    """The parsers below a parser, each with its own table."""
    lines = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help for choice in action._choices_actions}
            for name, below in action.choices.items():
                lines += ["", f"### {parser.prog} {name}", "", sentence(helps.get(name) or ""), *table(below._actions)]
    return lines


def sentence(text: str) -> str:
    """Words with a capital at their start and a full stop at their end."""
    text = " ".join(text.split())
    return text[:1].upper() + text[1:].rstrip(".") + "." if text else ""


def own_arguments(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The arguments of a verb itself, without those of a run."""
    # argparse's parsers have none of these, and a flag of theirs may have the name of a group, such as --data
    fields = set() if isinstance(parser, Parser) else {field.name for field in dataclasses.fields(RunConfig)}
    return [
        action
        for action in parser._actions
        if action.dest.split(".")[0] not in fields
        and action.dest != "local_rank"
        and not isinstance(action, argparse._SubParsersAction)
    ]


def verb_section(name: str) -> list[str]:
    """The section of one verb."""
    verb = VERBS[name]
    lines = ["", f"## scalekd {name}", "", sentence(verb.about), "", "```", *verb.examples, "```"]
    parser_of = getattr(module_of(name), "parser", None)
    if parser_of is None:
        return lines
    parser = parser_of()
    lines += [*table(own_arguments(parser)), *subcommands(parser)]
    if verb.takes_run:
        lines += ["", "It also takes `--recipe NAME` and every [field of a run](#fields-of-a-run)."]
    return lines


def fields_section() -> list[str]:
    """Every field of a run as a flag, in the groups of `RunConfig`."""
    lines = [
        "",
        "## Fields of a run",
        "",
        "`scalekd train`, `plan` and `doctor` take each of them as `--dotted.key value`, after `--recipe NAME` or "
        "`--config FILE`, whose value they replace. `null` is no value.",
    ]
    parser = run_parser("scalekd")
    actions = {action.dest: action for action in parser._actions}
    hints = typing.get_type_hints(RunConfig)
    groups = [field.name for field in dataclasses.fields(RunConfig) if dataclasses.is_dataclass(hints[field.name])]
    defaults = RunConfig()

    def rows(owner: type, values: Any, prefix: str) -> list[str]:
        kinds = typing.get_type_hints(owner)
        found = ["", "| flag | default | type | what it is |", "|---|---|---|---|"]
        for field in dataclasses.fields(owner):
            if dataclasses.is_dataclass(kinds[field.name]):
                continue
            help_text = actions[f"{prefix}{field.name}"].help or ""
            default = shown(getattr(values, field.name))
            found.append(f"| `--{prefix}{field.name}` | {default} | {kind_of(kinds[field.name])} | {cell(help_text)} |")
        return found

    lines += ["", "### Models, loss and batch", *rows(RunConfig, defaults, "")]
    for group in groups:
        owner = hints[group]
        first = (owner.__doc__ or "").strip().split("\n\n")[0]
        lines += ["", f"### --{group}.*", "", sentence(first), *rows(owner, getattr(defaults, group), f"{group}.")]
    return lines


def page() -> str:
    """The whole page."""
    lines = [HEAD.rstrip()]
    lines += ["", "| verb | what it does |", "|---|---|"]
    lines += [f"| [`scalekd {name}`](#scalekd-{name}) | {cell(verb.about)} |" for name, verb in VERBS.items()]
    for name in VERBS:
        lines += verb_section(name)
    return "\n".join([*lines, *fields_section()]) + "\n"


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1]
    (folder / "commands.md").write_text(page(), encoding="utf-8")
