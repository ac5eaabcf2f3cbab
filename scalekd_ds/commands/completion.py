"""What a shell completes: `source <(scalekd completion bash)`.

The shell asks this command at each press of the key: verbs, flags, recipes and DeepSpeed files are those that are there.
"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Iterable
from typing import Any

from scalekd_ds.commands import VERBS, module_of
from scalekd_ds.commands.parser import Parser


def parser() -> Parser:
    """The options."""
    own = Parser(
        "completion", "Prints the script that makes a shell complete verbs, flags, recipes and DeepSpeed files."
    )
    own.add_argument("shell", choices=("bash", "zsh"), help="to put into ~/.bashrc or ~/.zshrc: source <(...)")
    return own


def main(argv: list[str] | None = None) -> None:
    shell = parser().parse_args(argv).shell
    import argcomplete

    script = argcomplete.shellcode(["scalekd"], shell=shell)
    # zsh loads its completion system only where ~/.zshrc says so
    print(f"autoload -Uz compinit && compinit\n{script}" if shell == "zsh" else script)


def _recipes(**_: Any) -> list[str]:
    from scalekd_ds.recipes import RECIPES

    return list(RECIPES)


def _ds_configs(prefix: str, **_: Any) -> list[str]:
    from importlib.resources import files

    from argcomplete.completers import FilesCompleter

    names = [f.name.removesuffix(".json") for f in (files("scalekd_ds") / "ds_configs").iterdir()]
    return [*(name for name in names if name.startswith(prefix)), *FilesCompleter(["json"])(prefix)]


def _with_run(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds every field of a run that the parser does not have, for completion alone."""
    from scalekd_ds.cli import run_parser

    have = parser._option_string_actions
    for action in run_parser("scalekd")._actions:
        flags = [flag for flag in action.option_strings if flag.startswith("--") and flag not in have]
        if flags and action.help != argparse.SUPPRESS:
            added = parser.add_argument(*flags, nargs=None if action.nargs != 0 else 0, action=_Taken)
            added.completer = getattr(action, "completer", None)
            added.choices = action.choices
    return parser


class _Taken(argparse.Action):
    """Stands for an option that is never parsed."""

    def __call__(self, *_: Any) -> None:
        pass


def _verb_parser(verb: str) -> argparse.ArgumentParser | None:
    own = getattr(module_of(verb), "parser", None)
    if own is None:
        return None
    parser = own()
    return _with_run(parser) if VERBS[verb].takes_run and isinstance(parser, Parser) else parser


def _first_words(line: str) -> list[str]:
    # an unfinished quote is no reason to complete nothing
    try:
        return shlex.split(line)
    except ValueError:
        return line.split()


def complete() -> None:
    """Answers the shell and ends the process; the shell's question is in the environment."""
    import argcomplete

    line = os.environ.get("COMP_LINE", "")[: int(os.environ.get("COMP_POINT", "0"))]
    words: Iterable[str] = _first_words(line)
    verb = next(iter(list(words)[1:2]), "")
    finished = len(list(words)) > 2 or line.endswith((" ", "\t"))
    if not (verb in VERBS and finished):
        verbs = Parser(prog="scalekd")
        verbs.add_argument("verb", choices=(*VERBS,))
        argcomplete.autocomplete(verbs, default_completer=None)
        return
    parser = _verb_parser(verb)
    if parser is None:
        return
    # the verb stands where a program's name would
    os.environ["_ARGCOMPLETE"] = "2"
    for action in parser._actions:
        if "--recipe" in action.option_strings:
            action.completer = _recipes
        elif "--run.ds_config" in action.option_strings:
            action.completer = _ds_configs
    if isinstance(parser, argparse.ArgumentParser) and type(parser) is not Parser:
        # jsonargparse answers for its own parsers, types included
        parser.parse_args([])
    argcomplete.autocomplete(parser)
