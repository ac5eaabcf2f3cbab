"""The argparse parser of a verb: its help ends with examples, and its errors are UserErrors of one line."""

from __future__ import annotations

import argparse
import re
from typing import Any, NoReturn

from scalekd_ds.commands.verbs import VERBS
from scalekd_ds.errors import UserError, suggest


def examples_of(verb: str) -> str:
    """The examples of a verb, as the end of its help."""
    return "\n".join(["examples:", *(f"  {example}" for example in VERBS[verb].examples)])


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises UserError for wrong arguments, and takes no shortened flags.

    Args:
        verb: The verb as it is typed, whose examples are shown below the options; empty for none.
        description: What the verb does.
        epilog: Text between the options and the examples.
        **kwargs: Arguments of `argparse.ArgumentParser`.
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
        """Raises argparse's message as a UserError, with the nearest option."""
        if unknown := re.match(r"unrecognized arguments: (\S+)", message):
            flag = unknown[1].split("=", 1)[0]
            known = [option for option in self._option_string_actions if option.startswith("--")]
            message = f"unknown argument {flag!r}.{suggest(flag, known)} --help lists what there is."
            raise UserError(message)
        raise UserError(f"{message[:1].lower()}{message[1:]}; --help lists what there is.")
