"""The argparse parser of a verb: its help ends with examples, and its errors are UserErrors of one line."""

from __future__ import annotations

import argparse
import re
import textwrap
from typing import Any, NoReturn

from scalekd_ds.commands.verbs import VERBS
from scalekd_ds.errors import UserError, suggest

# columns of a terminal that most have
_COLUMNS = 80


def examples_of(verb: str) -> str:
    """The examples of a verb, as the end of its help."""
    return "\n".join(["examples:", *(f"  {line}" for example in VERBS[verb].examples for line in _broken(example))])


def _broken(command: str) -> list[str]:
    """A command as lines of which a terminal breaks none, and which a shell takes as they are."""
    lines: list[str] = []
    for part in command.replace(" --", "\n--").split("\n"):
        # two columns before the line, and two for its end
        if lines and len(lines[-1]) + 1 + len(part) <= _COLUMNS - 4:
            lines[-1] += f" {part}"
        else:
            lines.append(f"    {part}" if lines else part)
    return [*(f"{line} \\" for line in lines[:-1]), lines[-1]]


def _filled(text: str) -> str:
    """Text broken between words, which the formatter that keeps the lines of the examples does not do."""
    return textwrap.fill(" ".join(text.split()), _COLUMNS - 2, break_on_hyphens=False)


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
            description=_filled(description or "") or None,
            epilog="\n\n".join(filter(None, [_filled(epilog), examples_of(verb) if verb else ""])) or None,
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
