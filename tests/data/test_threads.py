"""Threads of a loader: those that are asked for, or a rank's share of its node's cores."""

import os

import pytest
import torch
from loading import train_loader

from scalekd_ds.config import DataConfig, RunConfig
from scalekd_ds.data.threads import decoder_threads, pool_threads
from scalekd_ds.training.changes import config_changes
from scalekd_ds.watching.provenance import hyperparameters


@pytest.mark.parametrize(
    ("cores", "ranks", "pool", "beside_a_gpu"),
    [(1, 1, 2, 2), (2, 1, 2, 2), (4, 1, 3, 3), (16, 1, 8, 4), (16, 4, 3, 3), (96, 8, 8, 4), (64, 16, 3, 3)],
)
def test_a_rank_takes_its_share_of_the_cores(monkeypatch, cores, ranks, pool, beside_a_gpu):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: ranks > 1)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, str(ranks))
    cfg = DataConfig()
    assert pool_threads(cfg) == pool
    assert decoder_threads(cfg, on_gpu=False) == pool and decoder_threads(cfg, on_gpu=True) == beside_a_gpu
    asked = DataConfig(threads=12)
    assert pool_threads(asked) == decoder_threads(asked, on_gpu=True) == 12


def test_a_verb_that_runs_alone_is_not_misled_by_the_variables_of_another_job(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    for text in ("64", "no number"):
        monkeypatch.setenv("WORLD_SIZE", text)
        assert pool_threads(DataConfig()) == 5


def test_a_process_group_that_no_launcher_has_begun_names_no_ranks_of_a_node(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert pool_threads(DataConfig()) == 5


def test_a_loader_has_these_threads(source, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(5)))
    loader = train_loader(source, DataConfig(image_size=32))
    assert loader._build_pipeline(lambda: None).num_threads == 4


def test_a_run_of_an_earlier_release_goes_on_without_a_remark(tmp_path):
    before, after = RunConfig().as_dict(), RunConfig().as_dict()
    before["data"]["threads"] = 2
    assert after["data"]["threads"] is None
    assert config_changes(before, after, tmp_path) == []
    assert not [name for name in hyperparameters(RunConfig()) if "threads" in name]
