#!/usr/bin/env python3
"""Does a student learn as much from a cache in eight bits as from the teacher itself? Several seeds of Fashion-MNIST.

Each seed trains `fashion-scalekd`, with crops and flips, once from the cache and once with the teacher on the same views: the
two share initialisation, images, views and order, so the difference is taken for each seed. Finished runs are not repeated.
"""

from __future__ import annotations

from pathlib import Path

import harness
import seeds

from scalekd_ds.errors import run_cli
from scalekd_ds.teacher_cache.sizes import STORES
from scalekd_ds.training.finished_run import log_of, run_logged

LIVE = "teacher on the same views"
AUGMENTED = ("--data.random_crop", "true", "--data.crop_scale", "[0.5,1.0]", "--data.hflip", "0.5")


def main() -> None:
    parser = seeds.parser_of(__doc__.splitlines()[0], seeds=5, out="runs/cached-seeds")
    parser.add_argument("--views", type=int, default=10, help="views of each image in the cache")
    parser.add_argument("--store", choices=STORES, default="int8", help="how tokens are kept")
    parser.add_argument("--images", type=int, default=1000, help="images of the training set")
    parser.add_argument("--teacher", type=Path, help="weights of a trained fashion-teacher; else one is trained")
    args = parser.parse_args()
    seeds.check(args)
    run = seeds.begin(args)
    teacher = args.teacher or seeds.trained_teacher(run, args)
    common = ["--teacher", str(teacher), *AUGMENTED, "--data.train_images", str(args.images), "--data.subset_seed", "0"]
    common += seeds.schedule_of(args)
    name = f"cache-{args.store}"
    cache = args.out / name
    made = [
        "--recipe",
        "fashion-scalekd",
        "--data.root",
        str(args.data),
        *common,
        "--seed",
        "0",
        "--run.progress",
        "plain",
    ]
    made += ["--views", str(args.views), "--store", args.store, "--out", str(cache)]
    run_logged("cache", made, seeds.cores(), log_of(args.out, name), name)
    rows = {
        LIVE: ("--data.views", str(args.views), "--data.view_seed", "0"),
        f"{args.store} cache": ("--teacher_cache", str(cache)),
    }
    found = seeds.summary(seeds.run_all(run, args, rows, common), LIVE)
    settings = {setting: getattr(args, setting) for setting in ("store", "views", "images", "epochs", "seeds")}
    path = harness.results_dir(args.results) / f"cached-seeds-{args.store}.json"
    harness.write_json(path, {"benchmark": "cached seeds", **settings, "rows": found})
    lines = seeds.table(found, "to the teacher")
    path.with_suffix(".md").write_text(lines)
    print(lines, end="")


if __name__ == "__main__":
    run_cli(main)
