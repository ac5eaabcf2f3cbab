#!/usr/bin/env python3
"""What a teacher cache saves of a step, what reading it costs, and at what rate it is written: `python benchmarks/cached.py`.

- **Step**: whole steps of two runs as `training.setup.build` makes them on one rank (loader, teacher or cache, student,
  projectors, DeepSpeed's backward and optimizer), live and from a cache of the same views, in turn. The floor is a step
  without the teacher: the live step less the time that it spends in its teacher.
- **Writing**: the loop of `scalekd cache` over the same batches in turn with the loop without packing and writing.
- **Reading alone**: batches of made-up entries in the cache's own order and in random order, by what tokens are stored in,
  on one thread, in turn with plain `pread` of the same bytes, which is the floor. All bytes are in the page cache: a disk's
  own time is added where they are not.

Images are generated JPEGs and weights are random, because speed does not depend on them. JSON is written after each part.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any, get_args

import cached_reading
import cached_writing
import harness
import pairs
import timing
import torch
from loader import make_images

from scalekd_ds.caching import prepare
from scalekd_ds.caching.job import make_cache
from scalekd_ds.caching.options import CacheOptions
from scalekd_ds.config import RunConfig
from scalekd_ds.data.run_sources import read_sources
from scalekd_ds.engine.processes import end_processes, start_processes
from scalekd_ds.errors import UserError, run_cli
from scalekd_ds.process.signals import outcome
from scalekd_ds.teacher_cache.records import Store
from scalekd_ds.training.run import Run
from scalekd_ds.training.setup import build
from scalekd_ds.training.step import train_step
from scalekd_ds.watching.timing import StepTimer

# written before anything was measured, and printed beside it
PREDICTIONS = {
    ("swin_tiny-resnet18", "cpu"): {
        "live/cached": 1.42,
        "floor": 1.43,
        "teacher_share": 0.30,
        "read_share": 0.0005,
        "decode_share": 0.0005,
        "write_rate": 0.99,
        "entries_per_s": {
            "int8": {"in order": 12000, "random": 6000},
            "bf16": {"in order": 7000, "random": 4500},
            "fp32": {"in order": 3500, "random": 3000},
        },
        "source": "multiply-adds of both models and projectors; 6 copies and a CRC-32 of each entry at 1 to 3 GB/s",
    },
}
PARTS = ("step", "writing", "reading")
# of `make_images`
CLASSES = 10
# what a turn takes beside the parts of its steps
BESIDE = ("read", "processor")
# the goals
MOST_READ_SHARE, LEAST_WRITE_RATE = 0.03, 0.95


def config_of(args: argparse.Namespace, root: Path) -> RunConfig:
    """The run that is measured, on the images in `root`.

    Raises:
        UserError: The pair or the recipe is unknown.
    """
    try:
        cfg = pairs.config_of(args.pair, args.recipe)
    except ValueError as error:
        raise UserError(str(error)) from None
    data = dataclasses.replace(cfg.data, root=str(root), train_images=None, threads=args.threads)
    if args.size is not None:
        data = dataclasses.replace(data, image_size=args.size)
    # nothing beside the steps: no evaluation, pictures or comparison with the teacher at the start
    run = dataclasses.replace(
        cfg.run, dir=str(root / "run"), ds_config=args.ds_config, progress="none", cache_gate=0, pictures=0
    )
    return dataclasses.replace(
        cfg,
        teacher_kwargs=cfg.teacher_kwargs | {"num_classes": CLASSES},
        global_batch_size=args.batch,
        micro_batch_size=args.batch,
        data=data,
        run=run,
    )


class Turn:
    """A run and what its turns have taken; a call is a turn of `steps` steps.

    Attributes:
        losses: The total loss of each step.
        taken: Of each turn, seconds a step of all, of each part, of the threads that read the cache (`read`), and of the
            processor.
    """

    def __init__(self, run: Run, steps: int) -> None:
        self.run, self.steps = run, steps
        self.batches, self.timer = iter(run.train_loader), StepTimer(run.device)
        self.losses: list[torch.Tensor] = []
        self.taken: list[dict[str, float]] = []
        run.distiller.time_part = self.timer.part
        run.engine.train()

    def _read_s(self) -> float:
        return 0.0 if self.run.cache is None else self.run.cache.seconds

    def __call__(self) -> None:
        read, processor = self._read_s(), time.process_time()
        self.timer.reset()
        for _ in range(self.steps):
            self.losses.append(train_step(self.run, self.batches)["loss/total"])
            self.run.step += 1
        wall, shares = self.timer.read()
        parts = {name: share * wall for name, share in shares.items()} | {"all": wall, "read": self._read_s() - read}
        # of all threads, those of the loader too
        parts["processor"] = time.process_time() - processor
        self.taken.append({name: seconds / self.steps for name, seconds in parts.items()})


def measure_steps(cfg: RunConfig, cache: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Steps live and from the cache in turn."""
    live = build(cfg)
    cached = build(dataclasses.replace(cfg, teacher_cache=str(cache)))
    turns = {"live": Turn(live, args.steps), "cached": Turn(cached, args.steps)}
    timing.seconds_of(timing.alternate(turns, live.device, args.rounds, args.warmup))
    found: dict[str, Any] = {"rounds": args.rounds, "steps_in_a_turn": args.steps, "runs": {}}
    for name, turn in turns.items():
        turn.taken = turn.taken[-args.rounds :]
        names = list(dict.fromkeys(part for taken in turn.taken for part in taken))
        found["runs"][name] = {
            part: timing.quantiles([1e3 * taken.get(part, 0.0) for taken in turn.taken]) | {"unit": "ms"}
            for part in names
        }
        turn.run.train_loader.close()
    pairs_of_turns = list(zip(turns["live"].taken, turns["cached"].taken, strict=True))
    found |= {
        "live/cached": timing.quantiles([a["all"] / b["all"] for a, b in pairs_of_turns]),
        "live/cached, processor": timing.quantiles([a["processor"] / b["processor"] for a, b in pairs_of_turns]),
        "floor": timing.quantiles([a["all"] / (a["all"] - a["teacher"]) for a, _ in pairs_of_turns]),
        "teacher_share": timing.quantiles([a["teacher"] / a["all"] for a, _ in pairs_of_turns]),
        "read_share": timing.quantiles([b["read"] / b["all"] for _, b in pairs_of_turns]),
        "decode_share": timing.quantiles([b["teacher"] / b["all"] for _, b in pairs_of_turns]),
        "of_floor": timing.quantiles([(a["all"] - a["teacher"]) / b["all"] for a, b in pairs_of_turns]),
    }
    # on the same weights; later ones differ by what the storing of the steps before has changed
    first = [float(turn.losses[0]) for turn in turns.values()]
    found["first_losses"] = dict(zip(turns, first, strict=True))
    return found


def cells(found: dict[str, float]) -> list[float]:
    """The three columns of a measure."""
    return [found[end] for end in ("median", "p20", "p80")]


def rows_of_step(step: dict[str, Any], predicted: dict[str, Any]) -> list[list[Any]]:
    """Rows of the table: the parts of both runs' steps, and what the cache saves and costs."""
    rows = []
    for name, parts in step["runs"].items():
        named = ("all", *(part for part in parts if part not in ("all", *BESIDE)))
        rows += [[f"{name}: {part}, ms a step", *cells(parts[part]), None, None] for part in named]
    rows.append(["cached: reading, beside the step, ms", *cells(step["runs"]["cached"]["read"]), None, None])
    floors = {"live/cached": step["floor"]["median"], "read_share": MOST_READ_SHARE}
    titles = {
        "live/cached": "step, live over cached",
        "live/cached, processor": "the same, processor's time",
        "floor": "live step over live step without teacher",
        "of_floor": "of this floor, by round",
        "teacher_share": "teacher's share of the live step",
        "read_share": "reading's share of the cached step",
        "decode_share": "decoding's share of the cached step",
    }
    return rows + [[t, *cells(step[name]), floors.get(name), predicted.get(name)] for name, t in titles.items()]


def rows_of_writing(found: dict[str, Any], predicted: dict[str, Any]) -> list[list[Any]]:
    """Rows of the table: both rates and their ratio."""
    rows = [[f"{name}, images/s", *cells(rate), None, None] for name, rate in found["images_per_s"].items()]
    titles = {
        "write_rate": "written over bare",
        "write_rate, processor": "the same, processor's time",
        "write_rate, in the loop": "share of the loop outside of the writer",
    }
    goals = [LEAST_WRITE_RATE, predicted.get("write_rate")]
    return rows + [[title, *cells(found[name]), *goals] for name, title in titles.items()]


def show(part: str, found: Any, predicted: dict[str, Any]) -> None:
    """Prints what was measured of a part, with floors or goals, and predictions."""
    if part == "reading":
        cached_reading.show(found, predicted.get("entries_per_s", {}))
        return
    rows = (rows_of_step if part == "step" else rows_of_writing)(found, predicted)
    harness.print_table(["", "median", "p20", "p80", "floor or goal", "predicted"], rows)
    if part == "step":
        losses = ", ".join(f"{name} {loss:.6g}" for name, loss in found["first_losses"].items())
        print(f"total loss of the first step: {losses}")


def measure(args: argparse.Namespace, root: Path) -> None:
    """Measures the parts that are asked for, in `root`, and writes and prints the results."""
    options = CacheOptions(root / "cache", args.views, args.store)
    cfg = prepare.with_views(config_of(args, root), options)
    make_images(root / "train", args.images)
    make_images(root / "val", CLASSES)
    device = start_processes()
    result: dict[str, Any] = {
        "benchmark": "cached",
        "machine": harness.machine(device),
        "settings": {name: value for name, value in vars(args).items() if name != "out"},
        "predictions": PREDICTIONS.get((args.pair, device.type)),
    }
    path = harness.results_dir(args.out) / f"cached-{args.pair or args.recipe}-{device.type}.json"

    def save(part: str) -> None:
        harness.write_json(path, result)
        show(part, result[part], result["predictions"] or {})

    train, val = read_sources(cfg)
    built = prepare.build(cfg, options, train)
    if "reading" in args.part:
        result["reading"] = cached_reading.measure(root, built.manifest, args.entries, args.rounds, args.warmup)
        save("reading")
    if "writing" in args.part:
        prepare.place(built, cfg, val, len(train.classes), device)
        result["writing"] = cached_writing.measure(cfg, built, train, root, args)
        save("writing")
    if "step" in args.part:
        make_cache(cfg, options)
        result["step"] = measure_steps(cfg, options.out, args)
        save("step")
    end_processes()
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pair", help=f"one of {', '.join(pairs.PAIRS)} (default: swin_tiny-resnet18)")
    parser.add_argument("--recipe", help="a recipe of the library in place of a pair")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--store", choices=get_args(Store), default="int8", help="what the cache of the steps holds tokens in"
    )
    parser.add_argument("--ds-config", default="cpu_fp32" if not torch.cuda.is_available() else "zero1")
    parser.add_argument("--size", type=int, help="pixels of a side (default: the pair's)")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--images", type=int, default=96, help="number of generated JPEGs of 500x400")
    parser.add_argument("--views", type=int, default=1, help="views in the cache of the steps")
    parser.add_argument("--threads", type=int, help="decoding threads of the loader")
    parser.add_argument("--steps", type=int, default=1, help="steps in a turn")
    parser.add_argument("--batches", type=int, default=4, help="batches in a turn of writing")
    parser.add_argument("--entries", type=int, default=1024, help="made-up entries in a turn of reading")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--out", help="folder of the JSON; else $OUT, else benchmarks/results")
    args = parser.parse_args()
    if args.pair is None and args.recipe is None:
        args.pair = "swin_tiny-resnet18"
    # a run reads in the cache's own order until it comes to a view again; the loader reads three batches ahead
    needed = args.batch * ((args.rounds + args.warmup) * args.steps + 3)
    if args.images < CLASSES or args.images * args.views < needed:
        raise UserError(
            f"--images is {args.images} and --views {args.views}: there must be {CLASSES} images or more, and their product "
            f"at least {needed}, the images that all steps take."
        )
    outcome("nothing was written")
    with tempfile.TemporaryDirectory() as made:
        measure(args, Path(made))


if __name__ == "__main__":
    run_cli(main)
