"""Shell completion: `source <(scalekd completion bash)`.

The shell runs `scalekd` at each press of the tab key, and `complete` answers with the verbs, flags, recipes and DeepSpeed
files that exist at that time.
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
    """The verb's options."""
    options = Parser(
        "completion", "Prints the script that makes a shell complete verbs, flags, recipes and DeepSpeed files."
    )
    options.add_argument("shell", choices=("bash", "zsh"), help="to put into ~/.bashrc or ~/.zshrc: source <(...)")
    return options


def main(argv: list[str] | None = None) -> None:
    shell = parser().parse_args(argv).shell
    import argcomplete

    script = argcomplete.shellcode(["scalekd"], shell=shell)
    # zsh loads its completion system only where ~/.zshrc says so
    print(f"autoload -Uz compinit && compinit\n{script}" if shell == "zsh" else script)


def _complete_recipe(**_: Any) -> list[str]:
    from scalekd_ds.recipes import RECIPES

    return list(RECIPES)


def _complete_ds_config(prefix: str, **_: Any) -> list[str]:
    from importlib.resources import files

    from argcomplete.completers import FilesCompleter

    names = [f.name.removesuffix(".json") for f in (files("scalekd_ds") / "ds_configs").iterdir()]
    return [*(name for name in names if name.startswith(prefix)), *FilesCompleter(["json"])(prefix)]


def _run_parser(verb: str) -> argparse.ArgumentParser:
    """The parser of a run's fields, with completers for recipes, DeepSpeed files, choices and paths."""
    from argcomplete.completers import FilesCompleter

    from scalekd_ds.config.parser import run_parser

    parser = module_of("train").parser() if verb == "train" else run_parser("scalekd")
    completers: dict[str, Any] = {"--recipe": _complete_recipe, "--run.ds_config": _complete_ds_config}
    action: Any
    for action in parser._actions:
        kind = getattr(action, "_typehint", None)
        if action.option_strings and action.option_strings[0] in completers:
            action.completer = completers[action.option_strings[0]]
        elif get_origin(kind) is Literal:
            action.completer = partial(_complete_choice, get_args(kind))
        elif kind is str:
            # most fields of text are folders or files of weights
            action.completer = FilesCompleter()
    return parser


def _complete_choice(values: tuple[str, ...], **_: Any) -> list[str]:
    return list(values)


def _add_run_flags(parser: argparse.ArgumentParser, run: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds the flags of `run` that `parser` does not have, for completion alone, and returns `parser`."""
    for action in run._actions:
        flags = [f for f in action.option_strings if f.startswith("--") and f not in parser._option_string_actions]
        if flags and action.help != argparse.SUPPRESS:
            added: Any = parser.add_argument(*flags, nargs=None if action.nargs != 0 else 0, action=_CompletionOnly)
            added.completer = getattr(action, "completer", None)
    return parser


class _CompletionOnly(argparse.Action):
    """The action of a flag that is completed by the shell and never parsed."""

    def __call__(self, *_: Any) -> None:
        pass


def _verb_parser(verb: str) -> argparse.ArgumentParser | None:
    """The parser whose flags are completed after a verb, or None if it has none."""
    if verb == "train":
        return _run_parser(verb)
    parser_of = getattr(module_of(verb), "parser", None)
    if parser_of is None:
        return None
    return _add_run_flags(parser_of(), _run_parser(verb)) if VERBS[verb].takes_run else parser_of()


def _split_words(line: str) -> list[str]:
    # a line that is being typed may have an unfinished quote, which shlex refuses
    try:
        return shlex.split(line)
    except ValueError:
        return line.split()


def complete() -> None:
    """Answers the shell, whose command line is in the environment variable COMP_LINE, and ends the process."""
    import argcomplete

    line = os.environ.get("COMP_LINE", "")[: int(os.environ.get("COMP_POINT", "0"))]
    words = _split_words(line)
    verb = words[1] if len(words) > 1 else ""
    verb_is_complete = len(words) > 2 or line.endswith((" ", "\t"))
    if not (verb in VERBS and verb_is_complete):
        verbs = Parser(prog="scalekd")
        verbs.add_argument("verb", choices=(*VERBS,))
        no_completer: Any = None
        argcomplete.autocomplete(verbs, always_complete_options=False, default_completer=no_completer)
        return
    parser = _verb_parser(verb)
    if parser is None:
        return
    # the number of words before the first argument: `scalekd` and the verb
    os.environ["_ARGCOMPLETE"] = "2"
    if not isinstance(parser, Parser):
        # jsonargparse completes its own parsers when they parse, and ends the process
        parser.parse_args([])
    argcomplete.autocomplete(parser)
