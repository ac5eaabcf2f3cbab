"""Caches and runs of a tiny pair, one after the other in the same ranks, with every augmentation that a view has."""

import json

import tiny_run
from forking import forked_ranks
from launching import WORKERS

AUGMENTED = [
    *("--data.hflip", 0.5, "--data.random_crop", "true", "--data.auto_augment", "rand-m9-n2-mstd0.5-inc1"),
    *("--data.color_jitter", "[0.4,0.4,0.4]", "--data.random_erasing", 0.5, "--data.erasing_fill", "noise"),
    *("--data.mixup", 0.8, "--data.cutmix", 1.0, "--data.mix_probability", 0.7),
]


def words(data, run_dir, *more):
    """A run whose batches of two are those of the cache, since 40 images are an even number."""
    common = [*AUGMENTED, "--run.pictures", 0, "--run.eval_every", 0, "--schedule.epochs", 4, *more]
    return [str(word) for word in tiny_run.arguments(data, run_dir, "--global_batch_size", 12, *common)]


def live(data, run_dir, views, *more):
    return {"cache": None, "run": words(data, run_dir, "--data.views", views, "--data.mix_by", "view", *more)}


def cached(data, run_dir, cache, *more):
    return {"cache": None, "run": words(data, run_dir, "--teacher_cache", cache, *more)}


def caching(data, out, views, *more, **options):
    given = {"out": str(out), "views": views, "store": "fp32", "logits": "all", **options}
    return {"cache": given, "run": words(data, out.parent / "none", *more)}


def run_all(tmp_path, jobs, ranks):
    listed = tmp_path / "jobs.json"
    listed.write_text(json.dumps(jobs))
    done = forked_ranks(WORKERS / "cache_many.py", listed, ranks=ranks)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done
