"""From the command line to a RunConfig: `--recipe NAME`, then any field as `--dotted.key value`."""

from __future__ import annotations

import sys
import warnings
from argparse import ArgumentError
from collections.abc import Callable
from pathlib import Path

from jsonargparse import ArgumentParser

from scalekd_ds.config import RunConfig
from scalekd_ds.config.parser import instantiate, one_line, read_config, run_parser
from scalekd_ds.errors import UserError, suggest
from scalekd_ds.recipes import RECIPES


def _base(args: list[str]) -> RunConfig:
    """The recipe or file that the arguments start from."""
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
    """Parses a training command line; `prog`, `extend` and `epilog` are as in `run_parser`.

    Returns:
        The run, and the file that --dump-config asks for; None where the arguments only asked for a listing.

    Raises:
        UserError: Unknown recipe, key or value.
    """
    args = sys.argv[1:] if args is None else args
    warnings.filterwarnings("ignore", module="jsonargparse")
    if "--list-recipes" in args:
        from scalekd_ds.recipes.listing import print_recipes

        print_recipes()
        return None
    parser = run_parser(prog, extend, epilog)
    base = _base(args)
    parser.set_defaults(base.as_dict())
    try:
        parsed = parser.parse_args(args)
        run = instantiate(parser, parsed)
    except ArgumentError as error:
        raise UserError(one_line(error, parser)) from None
    return run, Path(parsed.dump_config) if parsed.dump_config else None
