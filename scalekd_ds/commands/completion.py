"""What a shell completes: `source <(scalekd completion bash)`.

The shell asks this command at each press of the key: verbs, flags, recipes and DeepSpeed files are those that are there.
"""

from __future__ import annotations

import argparse
import os
import shlex
from functools import partial
from typing import Any, Literal, get_args, get_origin

from scalekd_ds.commands.parser import Parser
from scalekd_ds.commands.verbs import VERBS, module_of


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


def _run_parser(verb: str) -> argparse.ArgumentParser:
    """The parser of a run's fields, whose values are completed where there is something to choose from."""
    from argcomplete.completers import FilesCompleter

    from scalekd_ds.config.parser import run_parser

    parser = module_of("train").parser() if verb == "train" else run_parser("scalekd")
    own: dict[str, Any] = {"--recipe": _recipes, "--run.ds_config": _ds_configs}
    for action in parser._actions:
        kind = getattr(action, "_typehint", None)
        if action.option_strings and action.option_strings[0] in own:
            action.completer = own[action.option_strings[0]]
        elif get_origin(kind) is Literal:
            action.completer = partial(_choices, get_args(kind))
        elif kind is str:
            # folders and weights
            action.completer = FilesCompleter()
    return parser


def _choices(values: tuple[str, ...], **_: Any) -> list[str]:
    return list(values)


def _with_run(parser: argparse.ArgumentParser, run: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds the options of `run` that the parser does not have."""
    for action in run._actions:
        flags = [f for f in action.option_strings if f.startswith("--") and f not in parser._option_string_actions]
        if flags and action.help != argparse.SUPPRESS:
            added = parser.add_argument(*flags, nargs=None if action.nargs != 0 else 0, action=_Taken)
            added.completer = getattr(action, "completer", None)
    return parser


class _Taken(argparse.Action):
    """Stands for an option that is never parsed."""

    def __call__(self, *_: Any) -> None:
        pass


def _verb_parser(verb: str) -> argparse.ArgumentParser | None:
    if verb == "train":
        return _run_parser(verb)
    own = getattr(module_of(verb), "parser", None)
    if own is None:
        return None
    return _with_run(own(), _run_parser(verb)) if VERBS[verb].takes_run else own()


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
    words = _first_words(line)
    verb = words[1] if len(words) > 1 else ""
    finished = len(words) > 2 or line.endswith((" ", "\t"))
    if not (verb in VERBS and finished):
        verbs = Parser(prog="scalekd")
        verbs.add_argument("verb", choices=(*VERBS,))
        argcomplete.autocomplete(verbs, always_complete_options=False, default_completer=None)
        return
    parser = _verb_parser(verb)
    if parser is None:
        return
    # the verb stands where a program's name would
    os.environ["_ARGCOMPLETE"] = "2"
    if not isinstance(parser, Parser):
        # jsonargparse answers for its own parser
        parser.parse_args([])
    argcomplete.autocomplete(parser)
