"""What a run compares with its cache before the first step: the views that it makes, and the teacher where it has one."""

import dataclasses
import json

import pytest
import tiny_run
import torch
from cache_jobs import AUGMENTED, caching, run_all
from forking import forked_ranks
from launching import WORKERS

from scalekd_ds.data.run_sources import read_sources
from scalekd_ds.errors import UserError
from scalekd_ds.recipes.command_line import parse_run
from scalekd_ds.teacher_cache.reader import TeacherCache
from scalekd_ds.teacher_cache.settings import adopt
from scalekd_ds.training.cache_gate import compare_with_run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    data = tiny_run.images(folder / "data")
    run_all(folder, [caching(data, folder / "cache", 2, store="int8")], ranks=1)
    return data, folder / "cache"


def compare(made, *words, edit=lambda cfg: cfg):
    data, folder = made
    arguments = tiny_run.arguments(data, folder.parent / "run", *AUGMENTED, "--teacher_cache", folder, *words)
    cfg, _ = parse_run([str(word) for word in arguments])
    cache = TeacherCache(folder)
    cfg = edit(adopt(cfg, cache))
    return compare_with_run(cfg, cache, read_sources(cfg)[0], torch.device("cpu"))


def test_views_and_answers_agree(made):
    said = compare(made)
    assert said.startswith("teacher cache: 64 entries were made again: 1 - cosine (spatial) ")
    assert "KL of the logits" in said
    assert compare(made, "--run.cache_gate", 10).startswith("teacher cache: 10 entries")
    assert compare(made, "--run.cache_gate", 0) is None


def test_without_the_teachers_weights_the_views_alone_are_compared(made):
    # random weights of another seed are those of another teacher
    assert compare(made, "--seed", 4) == (
        "teacher cache: 64 of its views were made again and agree; the teacher has no file of weights here"
    )


def test_views_that_are_drawn_otherwise_are_refused(made):
    def other_crops(cfg):
        return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, crop_scale=(0.1, 0.2)))

    with pytest.raises(
        UserError, match=r"views of this run are not those .* of 64 that were compared, \d+% have other"
    ):
        compare(made, "--seed", 4, edit=other_crops)


def test_a_teacher_of_other_weights_is_refused(made):
    def other_seed(cfg):
        return dataclasses.replace(cfg, teacher_kwargs=cfg.teacher_kwargs | {"weight_init": "moco"})

    with pytest.raises(UserError, match=r"teacher's weights are not those .* was made with"):
        compare(made, edit=other_seed)


def test_answers_beyond_the_bounds_are_refused(made):
    with pytest.raises(
        UserError, match=r"answers to 64 views are not those .* allow more with --run.teacher_gate_spatial"
    ):
        compare(made, "--run.teacher_gate_spatial", 1e-12)


def test_a_refusal_of_a_run_is_one_line(made, tmp_path):
    """On every rank the same, whichever of them finds it."""
    data, folder = made
    words = tiny_run.arguments(data, tmp_path / "run", *AUGMENTED, "--teacher_cache", folder, "--data.hflip", 0.25)
    listed = tmp_path / "jobs.json"
    listed.write_text(json.dumps([{"cache": None, "run": [str(word) for word in words]}]))
    done = forked_ranks(WORKERS / "cache_many.py", listed, ranks=2)
    assert done.returncode != 0
    assert "--data.hflip is 0.25" in done.stderr and not (tmp_path / "run" / "checkpoints").exists()
