"""The `scalekd` command: runs the verb that it is given."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from scalekd_ds.commands.verbs import VERBS, module_of
from scalekd_ds.errors import UserError, explained, run_cli, suggest


def usage() -> str:
    """What `scalekd --help` prints: each verb, what it does, and an example."""
    width = max(map(len, VERBS))
    lines = ["usage: scalekd VERB ...", "", "Distil huge vision transformers into models that ship.", ""]
    for name, verb in VERBS.items():
        lines += [f"  {name:<{width}}  {verb.about}", f"  {'':<{width}}      {verb.examples[0]}"]
    return "\n".join([*lines, "", "scalekd VERB --help lists a verb's options.", ""])


def dispatch(argv: list[str]) -> int | None:
    """Runs the verb that `argv` starts with, and returns its exit status.

    Raises:
        UserError: There is no verb or an unknown one, or the verb itself raises it.
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
    verb = name.replace("_", "-")
    if verb not in VERBS:
        given = f"unknown verb {name!r}.{suggest(name, VERBS)}" if name else "no verb is given."
        raise UserError(f"{given} Verbs: {', '.join(VERBS)}; scalekd --help says what they do.")
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
