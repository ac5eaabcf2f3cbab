"""Runs that the tests of the plan count: what two ranks' engines hold in each case, and pairs of which one step is made."""

from __future__ import annotations

import sys
from functools import cache

import pytest
import torch
from launching import WORKERS
from tiny_pair import SWIN

sys.path.append(str(WORKERS))
from plan_worker import CLASSES, RANKS, config_of, ds_json

from scalekd_ds.config import DataConfig, DistillConfig, RunConfig
from scalekd_ds.plan.fake_step import StepCount
from scalekd_ds.plan.measure import Measured, measure
from scalekd_ds.plan.memory import Layout

SMALL_BUCKETS = {"reduce_bucket_size": 100_000}
# at every stage both precisions; all three optimizers; buckets that fill up; ZeRO-3 with and without small layers left whole
CASES = {
    "zero0": ({"stage": 0}, False, "adamw"),
    "zero0 autocast": ({"stage": 0}, True, "sgd"),
    "zero1": ({"stage": 1}, False, "sgd"),
    "zero1 autocast": ({"stage": 1} | SMALL_BUCKETS, True, "adamw"),
    "zero2": ({"stage": 2} | SMALL_BUCKETS, False, "adamw"),
    "zero2 overlap": ({"stage": 2, "overlap_comm": True} | SMALL_BUCKETS, True, "lamb"),
    "zero3": ({"stage": 3, "stage3_param_persistence_threshold": 0} | SMALL_BUCKETS, False, "lamb"),
    "zero3 small layers whole": ({"stage": 3, "stage3_param_persistence_threshold": 5000}, True, "adamw"),
    "zero3 gathers twice": (
        {
            "stage": 3,
            "stage3_param_persistence_threshold": 1000,
            "stage3_max_reuse_distance": 0,
            "stage3_max_live_parameters": 0,
            "stage3_prefetch_bucket_size": 0,
        }
        | SMALL_BUCKETS,
        True,
        "sgd",
    ),
}


@cache
def counted(autocast: bool) -> Measured:
    """The cases' pair, counted as it runs on CPUs; its activations are 0, since a step is not counted (`counted_pair` does)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scalekd_ds.plan.measure.count_step", lambda *_: StepCount(*[0] * 6))
        return measure(config_of("adamw"), CLASSES, torch.bfloat16 if autocast else None, on_gpu=False)


def planned(name: str) -> tuple[Measured, RunConfig, Layout]:
    """A case as the plan's functions take it."""
    zero, autocast, optimizer = CASES[name]
    layout = Layout.of(ds_json({"zero_optimization": zero, "autocast": autocast}), RANKS, "replica")
    return counted(autocast), config_of(optimizer), layout


DINOV3 = {"embed_dim": 128, "depth": 4, "num_heads": 4, "mlp_ratio": 2, "num_classes": 10}
PAIRS = {
    "dinov3 to resnet": (
        "vit_7b_patch16_dinov3",
        DINOV3 | {"img_size": 64},
        "resnet18",
        {"layers": [1, 1, 1, 1], "channels": [32, 32, 64, 128]},
    ),
    "swin to vit": (
        "swin_tiny_patch4_window7_224",
        SWIN | {"num_classes": 10},
        "vit_tiny_patch16_224",
        {"img_size": 64, "patch_size": 8, "depth": 4},
    ),
}


def pair_of(name: str) -> RunConfig:
    """A pair of `PAIRS` as a run."""
    teacher, teacher_kwargs, student, student_kwargs = PAIRS[name]
    return RunConfig(
        student=student,
        student_kwargs=student_kwargs,
        teacher=teacher,
        teacher_kwargs=teacher_kwargs,
        teacher_weights="none",
        global_batch_size=8,
        data=DataConfig(image_size=64),
        distill=DistillConfig(softmax_scale=1.0),
    )


@cache
def counted_pair(name: str, dtype: torch.dtype | None) -> Measured:
    """A pair of `PAIRS`, counted as it runs on CPUs."""
    return measure(pair_of(name), 10, dtype, on_gpu=False)
