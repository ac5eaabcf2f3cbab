"""The argparse parser of a verb: examples at the end of its help, mistakes as one line."""

from __future__ import annotations

import argparse
import re
from typing import Any, NoReturn

from scalekd_ds.commands.verbs import VERBS
from scalekd_ds.errors import UserError, suggest


def examples_of(verb: str) -> str:
    """The end of a verb's help."""
    return "\n".join(["examples:", *(f"  {example}" for example in VERBS[verb].examples)])


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are UserErrors.

    Args:
        verb: As it is typed; its examples are shown below the options.
        description: What the verb does.
        epilog: Shown before the examples.
        **kwargs: argparse's.
    """

    def __init__(self, verb: str = "", description: str | None = None, epilog: str = "", **kwargs: Any) -> None:
        kwargs.setdefault("prog", f"scalekd {verb}")
        super().__init__(
            description=description,
            epilog="\n\n".join(filter(None, [epilog, examples_of(verb) if verb else ""])) or None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **kwargs,
        )

    def error(self, message: str) -> NoReturn:
        if unknown := re.match(r"unrecognized arguments: (\S+)", message):
            flag = unknown[1].split("=", 1)[0]
            known = [option for option in self._option_string_actions if option.startswith("--")]
            message = f"unknown argument {flag!r}.{suggest(flag, known)} --help lists what there is."
            raise UserError(message)
        raise UserError(f"{message[:1].lower()}{message[1:]}; --help lists what there is.")
