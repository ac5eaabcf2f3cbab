"""The `scalekd` command: runs the verb that it is given."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from scalekd_ds.commands.verbs import DOCUMENTS, FIRST_COMMANDS, GROUPS, VERBS, module_of
from scalekd_ds.errors import UserError, explained, run_cli, suggest


def usage() -> str:
    """What `scalekd --help` prints: the verbs in the order of a user's work, and what each does."""
    width = max(map(len, VERBS))
    lines = ["usage: scalekd VERB ...", "", "Distil huge vision transformers into models that ship."]
    for heading, names in GROUPS.items():
        lines += ["", heading, *(f"  {name:<{width}}  {VERBS[name].about}" for name in names)]
    return "\n".join([*lines, "", "scalekd VERB --help lists a verb's options, and commands to type.", ""])


def first_screen() -> str:
    """What `scalekd` alone prints: the commands of a first hour, in their order, and where the documents are."""
    width = max(len(command) for commands in FIRST_COMMANDS.values() for command, about in commands.items() if about)
    lines = ["scalekd distils a large vision transformer into a smaller image classifier."]
    for heading, commands in FIRST_COMMANDS.items():
        lines += ["", heading, *(f"  {command:<{width}}  {about}".rstrip() for command, about in commands.items())]
    return "\n".join([*lines, "", "All verbs: scalekd --help", f"Documents: {DOCUMENTS}", ""])


def dispatch(argv: list[str]) -> int | None:
    """Runs the verb that `argv` starts with, and returns its exit status.

    Raises:
        UserError: The verb is unknown, or raises it itself.
    """
    if len(argv) > 1 and argv[0].startswith(("--local_rank=", "--local-rank=")):
        # a launcher that starts `scalekd VERB` puts its own argument first
        argv = [argv[1], argv[0], *argv[2:]]
    name, rest = (argv[0], argv[1:]) if argv else ("", [])
    if name in ("-h", "--help", "help"):
        print(usage(), end="")
        return 0
    if name in ("-V", "--version"):
        from scalekd_ds import __version__

        print(f"scalekd_ds {__version__}")
        return 0
    if not argv:
        print(first_screen(), end="")
        # as argparse has it: a script whose variable for the verb is empty must not go on as if its command had worked
        return UserError.status
    verb = name.replace("_", "-")
    if verb not in VERBS:
        raise UserError(
            f"unknown verb {name!r}.{suggest(name, VERBS)} Verbs: {', '.join(VERBS)}; scalekd --help says what they do."
        )
    command: Callable[[list[str]], int | None] = module_of(verb).main
    return explained(lambda: command(rest))


def main() -> None:
    """The `scalekd` console command."""
    # DeepSpeed looks for ninja on PATH, where it is missing if the virtual environment is not activated
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    if "_ARGCOMPLETE" in os.environ:
        from scalekd_ds.commands.completion import complete

        complete()
    run_cli(lambda: dispatch(sys.argv[1:]))
