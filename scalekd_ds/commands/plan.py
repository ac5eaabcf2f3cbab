"""What a run needs, before it is started: `scalekd plan --recipe NAME --gpus N --gpu-memory GIB [--dotted.key value ...]`."""

from __future__ import annotations

import json
import sys

from scalekd_ds.commands.parser import Parser
from scalekd_ds.commands.quiet import on_cpu
from scalekd_ds.errors import UserError


def parser() -> Parser:
    """The planner's own arguments; all others are the run's."""
    from scalekd_ds.plan.assumptions import Assumptions

    own = Parser(
        "plan",
        "Memory by part, bytes on the wire, images/s and hours of a run, from shapes alone.",
        "--recipe NAME, and any field of a run as --dotted.key value, as for scalekd train (whose --help lists them).",
    )
    own.add_argument("--gpus", type=int, required=True, help="ranks")
    own.add_argument("--gpu-memory", type=float, required=True, metavar="GIB", help="of one GPU")
    own.add_argument("--nodes-of", type=int, default=8, metavar="N", help="GPUs in a node (default 8)")
    own.add_argument("--teacher-placement", choices=("auto", "replica", "sharded", "offload"), default="auto")
    own.add_argument("--stage", choices=("auto", "0", "1", "2", "3"), default="auto", help="ZeRO stage (default auto)")
    own.add_argument("--classes", type=int, default=1000, help="of the data (default 1000)")
    own.add_argument(
        "--train-images", type=int, metavar="N", help="in an epoch (default: the recipe's, else ImageNet-1K's)"
    )
    own.add_argument("--json", action="store_true", help="print JSON instead of tables")
    for name, value in vars(Assumptions()).items():
        own.add_argument(f"--assume.{name}", type=float, default=value, metavar="X", help=f"(default {value:g})")
    return own


def plan(argv: list[str] | None = None) -> None:
    """Prints the plan."""
    from scalekd_ds.plan.assumptions import Assumptions

    arguments, run = parser().parse_known_args(argv)
    given = vars(arguments)
    assume = Assumptions(**{name: given[f"assume.{name}"] for name in vars(Assumptions())})
    from scalekd_ds.plan.choose import Cluster, make_plan

    cluster = Cluster(arguments.gpus, arguments.gpu_memory, arguments.nodes_of)
    for flag, value in (("--classes", arguments.classes), ("--train-images", arguments.train_images)):
        if value is not None and value < 1:
            raise UserError(f"{flag} is {value}: it must be at least 1.")
    if not any(argument.split("=", 1)[0] in ("--recipe", "--config") for argument in run):
        raise UserError("no --recipe is given: launch/train.py --list-recipes prints them (or --config FILE).")
    from scalekd_ds.engine import ds_config
    from scalekd_ds.plan.measure import measure
    from scalekd_ds.plan.report import document, print_plan
    from scalekd_ds.recipes.command_line import parse_run

    parsed = parse_run(run, "scalekd plan")
    if parsed is None:
        return
    cfg, _ = parsed
    cfg.batches(cluster.gpus)
    measured = measure(cfg, arguments.classes, ds_config.autocast_dtype(ds_config.read(cfg.run.ds_config)))
    images = arguments.train_images or cfg.data.train_images or 1_281_167
    stage = None if arguments.stage == "auto" else int(arguments.stage)
    placement = arguments.teacher_placement
    best, plans = make_plan(cfg, cluster, arguments.classes, images, assume, placement, stage, measured)
    if arguments.json:
        json.dump(document(cfg, cluster, measured, assume, best, plans), sys.stdout, indent=1)
        print()
        return
    from rich.console import Console

    print_plan(Console(), cfg, cluster, measured, assume, best, plans)


def main(argv: list[str] | None = None) -> None:
    on_cpu()
    plan(argv)
