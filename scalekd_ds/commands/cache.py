"""Keeps a teacher's answers: `scalekd cache --recipe NAME --views K --out DIR`, alone or under the deepspeed launcher.

`scalekd cache --info DIR` and `scalekd cache --verify DIR` look at a cache that is there.
"""

from __future__ import annotations

import os
from pathlib import Path

from scalekd_ds.commands.parser import Parser
from scalekd_ds.commands.quiet import on_cpu, without_chatter
from scalekd_ds.commands.train import add_launcher_arguments, launch, launcher_command
from scalekd_ds.errors import UserError, run_cli
from scalekd_ds.process import output, signals
from scalekd_ds.teacher_cache.sizes import STORES, TOP_LOGITS

MODULE = "scalekd_ds.commands.cache"


def parser() -> Parser:
    """The options of the verb and of the launcher; all other arguments are those of the run."""
    options = Parser(
        "cache",
        "Asks a teacher once: its tokens and logits for K augmented views of each image, from which runs then train.",
        "--recipe NAME, and any field of a run as --dotted.key value, as for scalekd train (whose --help lists them).",
    )
    options.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the cache; one that was begun there goes on"
    )
    options.add_argument("--views", type=int, metavar="K", help="augmented views of each image that are kept")
    options.add_argument(
        "--store",
        choices=STORES,
        default=STORES[0],
        help="how tokens are kept: in 8 bits, scaled (default), or in floats",
    )
    options.add_argument(
        "--logits", default=str(TOP_LOGITS), metavar="N", help=f"largest logits kept, or all (default {TOP_LOGITS})"
    )
    options.add_argument("--dry-run", action="store_true", help="say what the cache would take, and make nothing")
    options.add_argument("--info", type=Path, metavar="DIR", help="say what a cache holds, and exit")
    options.add_argument(
        "--verify", type=Path, metavar="DIR", help="read a whole cache, name what is damaged, and exit"
    )
    add_launcher_arguments(options)
    return options


def _logits(text: str) -> int | str:
    if text == "all":
        return text
    try:
        return int(text)
    except ValueError:
        raise UserError(f"--logits is {text!r}: it must be a whole number, or all.") from None


def main(argv: list[str] | None = None) -> int | None:
    """Returns the launcher's status where it starts one, and 1 where a cache is damaged."""
    given, run = parser().parse_known_args(argv)
    if given.info is not None or given.verify is not None:
        on_cpu()
        from scalekd_ds.caching.look import show, verify

        return show(given.info) if given.info is not None else verify(given.verify)
    from scalekd_ds.recipes.command_line import parse_run

    parsed = parse_run(run, "scalekd cache")
    if parsed is None:
        return None
    cfg, dump = parsed
    if dump is not None:
        raise UserError("--dump-config is given to scalekd cache: `scalekd train --dump-config` writes a run.")
    for name, flag in (("out", "--out DIR"), ("views", "--views K")):
        if getattr(given, name) is None:
            raise UserError(f"{flag.split()[0]} is missing: scalekd cache needs {flag}; --help shows commands to type.")
    from scalekd_ds.caching.options import CacheOptions, checked

    options = CacheOptions(given.out, given.views, given.store, _logits(given.logits), given.dry_run)  # type: ignore[arg-type]
    checked(cfg, options)
    if (given.gpus is not None or given.hostfile is not None) and not given.dry_run:
        again = ["--out", str(given.out), "--views", str(given.views), "--store", given.store, "--logits", given.logits]
        return launch(launcher_command(given, [*again, *run], MODULE))
    if given.dry_run:
        on_cpu()
    without_chatter()
    from scalekd_ds.cluster.launcher import abandonment
    from scalekd_ds.cluster.ranks import rank_variables

    output.goes_on("caching")
    signals.outcome("nothing was written")
    signals.watch(abandonment())
    rank_variables(os.environ)
    from scalekd_ds.caching.job import make_cache
    from scalekd_ds.engine.processes import end_processes

    make_cache(cfg, options)
    if not given.dry_run:
        end_processes()
    return None


if __name__ == "__main__":
    run_cli(main)
