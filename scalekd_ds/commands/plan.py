"""Plans memory and time of a run before it starts.

`scalekd plan --recipe NAME --gpus N --gpu-memory GIB [--teacher-cache] [--dotted.key value ...]`
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from scalekd_ds.commands.parser import Parser
from scalekd_ds.commands.quiet import on_cpu
from scalekd_ds.errors import UserError

if TYPE_CHECKING:
    from argparse import Namespace

    from scalekd_ds.config import RunConfig
    from scalekd_ds.teacher_cache.sizes import Store


def parser() -> Parser:
    """The options of the planner itself; all other arguments are those of the run."""
    from scalekd_ds.plan.assumptions import Assumptions
    from scalekd_ds.teacher_cache.sizes import STORES, TOP_LOGITS

    options = Parser(
        "plan",
        "Memory by part, bytes on the wire, images/s and hours of a run, from shapes alone.",
        "--recipe NAME, and any field of a run as --dotted.key value, as for scalekd train (whose --help lists them).",
    )
    options.add_argument("--gpus", type=int, required=True, help="number of ranks")
    options.add_argument("--gpu-memory", type=float, required=True, metavar="GIB", help="memory of one GPU")
    options.add_argument("--nodes-of", type=int, default=8, metavar="N", help="GPUs in a node (default 8)")
    options.add_argument("--teacher-placement", choices=("auto", "replica", "sharded", "offload"), default="auto")
    options.add_argument(
        "--stage", choices=("auto", "0", "1", "2", "3"), default="auto", help="ZeRO stage (default auto)"
    )
    options.add_argument(
        "--classes", type=int, metavar="N", help="classes of the data (default: those in --data.root, else 1000)"
    )
    options.add_argument(
        "--train-images",
        type=int,
        metavar="N",
        help="images in an epoch (default: those in --data.root, else the recipe's, else ImageNet-1K's)",
    )
    cache = options.add_argument_group("a teacher cache")
    cache.add_argument(
        "--teacher-cache",
        action="store_true",
        help="plan the run from a teacher cache (scalekd cache), with what making and reading it takes",
    )
    cache.add_argument(
        "--views",
        type=int,
        metavar="K",
        help="views of each image in it (default: --data.views, else 10, or 20 with mixup or cutmix, up to the epochs)",
    )
    cache.add_argument("--cache-store", choices=STORES, help=f"how it holds the teacher's tokens (default {STORES[0]})")
    cache.add_argument(
        "--cache-logits",
        metavar="N",
        help=f"largest logits of each view that it holds, or all (default {TOP_LOGITS})",
    )
    options.add_argument("--json", action="store_true", help="print JSON instead of tables")
    for name, value in vars(Assumptions()).items():
        options.add_argument(f"--assume.{name}", type=float, default=value, metavar="X", help=f"(default {value:g})")
    return options


def plan(argv: list[str] | None = None) -> None:
    """Prints the plan.

    Raises:
        UserError: A wrong argument, a run that is not valid, or one that fits into no GPU.
    """
    from scalekd_ds.plan.assumptions import Assumptions

    arguments, run = parser().parse_known_args(argv)
    given = vars(arguments)
    assume = Assumptions(**{name: given[f"assume.{name}"] for name in vars(Assumptions())})
    from scalekd_ds.plan.choose import Cluster, make_plan

    views, store, logits = _cache_options(arguments)
    cluster = Cluster(arguments.gpus, arguments.gpu_memory, arguments.nodes_of)
    for flag, value in (("--classes", arguments.classes), ("--train-images", arguments.train_images)):
        if value is not None and value < 1:
            raise UserError(f"{flag} is {value}: it must be at least 1.")
    if not any(argument.split("=", 1)[0] in ("--recipe", "--config") for argument in run):
        raise UserError("no --recipe is given: launch/train.py --list-recipes prints them (or --config FILE).")
    from scalekd_ds.engine import ds_config
    from scalekd_ds.plan.cached import Contents, check_can_be_cached, default_views, plan_cache
    from scalekd_ds.plan.measure import from_cache, measure
    from scalekd_ds.plan.report import plans_as_dict, print_plan
    from scalekd_ds.recipes.command_line import parse_run

    parsed = parse_run(run, "scalekd plan")
    if parsed is None:
        return
    cfg, _ = parsed
    cfg.batches(cluster.gpus)
    classes, images = _size_of_data(cfg, arguments.classes, arguments.train_images)
    if arguments.teacher_cache or cfg.teacher_cache:
        check_can_be_cached(cfg)
    if arguments.teacher_cache:
        # the run with its teacher, which is what the cache is compared with
        cfg = replace(cfg, teacher_cache=None)
    measured = measure(cfg, classes, ds_config.autocast_dtype(ds_config.read(cfg.run.ds_config)))
    stage = None if arguments.stage == "auto" else int(arguments.stage)
    placement, cache = arguments.teacher_placement, None
    if arguments.teacher_cache:
        contents = Contents(images, views or default_views(cfg), measured.targets, store, logits)
        cache, plans = plan_cache(cfg, cluster, classes, assume, placement, stage, measured, contents)
        best, measured = cache.cached, from_cache(measured, contents.entry)
    else:
        best, plans = make_plan(cfg, cluster, classes, images, assume, placement, stage, measured)
    if arguments.json:
        json.dump(plans_as_dict(cfg, cluster, measured, assume, best, plans, cache), sys.stdout, indent=1)
        print()
        return
    from scalekd_ds.process.console import readable_console

    print_plan(readable_console(), cfg, cluster, measured, assume, best, plans, cache)


def _cache_options(arguments: Namespace) -> tuple[int | None, Store, int | None]:
    """(views, store, logits) of a cache as they are asked for, where `None` views are the run's own and `None` logits all.

    Raises:
        UserError: A number below 1, or an option of a cache where none is planned.
    """
    from scalekd_ds.teacher_cache.sizes import STORES, TOP_LOGITS

    given = {
        f"--{name}": getattr(arguments, name.replace("-", "_")) for name in ("views", "cache-store", "cache-logits")
    }
    for flag, value in given.items():
        if value is not None and not arguments.teacher_cache:
            raise UserError(f"{flag} is {value}, and no teacher cache is planned: add --teacher-cache or leave it out.")
    views, store, logits = given.values()
    if views is not None and views < 1:
        raise UserError(f"--views is {views}: it must be at least 1.")
    if logits is not None and logits != "all" and not (logits.isdecimal() and int(logits) > 0):
        raise UserError(f"--cache-logits is {logits}: it must be at least 1, or all.")
    return views, store or STORES[0], None if logits == "all" else int(logits or TOP_LOGITS)


def _size_of_data(cfg: RunConfig, classes: int | None, images: int | None) -> tuple[int, int]:
    """The number of classes, and of images in an epoch: as given, else of the data where it is here, else ImageNet-1K's.

    Raises:
        UserError: The folder of the data holds none that a run takes.
    """
    if (classes is None or images is None) and cfg.data.root and Path(cfg.data.root).is_dir():
        from scalekd_ds.data.run_sources import read_sources

        train, _ = read_sources(cfg)
        return classes or len(train.classes), images or len(train)
    return classes or 1000, images or cfg.data.train_images or 1_281_167


def main(argv: list[str] | None = None) -> None:
    on_cpu()
    plan(argv)
