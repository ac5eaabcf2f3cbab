"""Reads a run from the command line: `--recipe NAME`, then any field of `RunConfig` as `--dotted.key value`."""

from __future__ import annotations

import sys
import warnings
from argparse import ArgumentError
from collections.abc import Callable
from pathlib import Path

from jsonargparse import ArgumentParser

from scalekd_ds.config import RunConfig
from scalekd_ds.config.parser import describe_error, instantiate, read_config, run_parser
from scalekd_ds.errors import UserError, suggest
from scalekd_ds.recipes import RECIPES


def _starting_config(args: list[str]) -> RunConfig:
    """The run that the arguments change: that of --config or --recipe, or the defaults."""
    chosen: dict[str, str] = {}
    for flag in ("--recipe", "--config"):
        for position, arg in enumerate(args):
            if arg == flag and position + 1 < len(args):
                chosen[flag] = args[position + 1]
            elif arg.startswith(f"{flag}="):
                chosen[flag] = arg.split("=", 1)[1]
    if "--config" in chosen:
        return read_config(Path(chosen["--config"]))
    name = chosen.get("--recipe")
    if name is None:
        return RunConfig()
    if name not in RECIPES:
        raise UserError(f"unknown recipe {name!r}.{suggest(name, RECIPES)} Known: {', '.join(RECIPES)}.")
    return RECIPES[name]()


def parse_run(
    args: list[str] | None = None,
    prog: str = "scalekd train",
    extend: Callable[[ArgumentParser], None] | None = None,
    epilog: str | None = None,
) -> tuple[RunConfig, Path | None] | None:
    """Parses a training command line.

    Args:
        args: Its arguments; None takes those of this process.
        prog: As in `run_parser`.
        extend: As in `run_parser`.
        epilog: As in `run_parser`.

    Returns:
        The run, and the file that --dump-config asks for or None; or None alone where --list-recipes has been answered.

    Raises:
        UserError: An unknown recipe or option, or a value that its field cannot have.
    """
    args = sys.argv[1:] if args is None else args
    warnings.filterwarnings("ignore", module="jsonargparse")
    if "--list-recipes" in args:
        from scalekd_ds.recipes.listing import print_recipes

        print_recipes()
        return None
    parser = run_parser(prog, extend, epilog)
    parser.set_defaults(_starting_config(args).as_dict())
    try:
        parsed = parser.parse_args(args)
        run = instantiate(parser, parsed)
    except ArgumentError as error:
        raise UserError(describe_error(error, parser)) from None
    return run, Path(parsed.dump_config) if parsed.dump_config else None
