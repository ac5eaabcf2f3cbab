"""Runs that take seconds on two cores: their images, models and command lines, and what they logged."""

from __future__ import annotations

import json
from pathlib import Path

import tiny_pair
from image_fixtures import make_dataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# constructor arguments of swin_tiny_patch4_window7_224, for images of 32 pixels
SWIN = tiny_pair.SWIN | {"img_size": 32}
# with the classes of `images`
TEACHER = SWIN | {"num_classes": 3}
# of resnet18: one block a stage, and maps of 4x4 of images of 32 pixels at its end
RESNET = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "output_stride": 8}
# of every loss term that a run with such a teacher logs
TERMS = ("ce", "kd", "spatial_s3", "frequency_s3", "spatial_s4", "frequency_s4")


def images(folder: Path) -> Path:
    """40 images to train on, which are five steps an epoch, and 11 to evaluate, of three classes and 32 pixels."""
    return make_dataset(folder, train=40, val=11, classes=3, size=(32, 32))


def supervised_arguments(data: Path, run_dir: Path, *more) -> list:
    """A slim ResNet without a teacher on all images of `data`, without warm-up."""
    return [
        *("--recipe", "fashion-ce", "--data.root", data, "--run.dir", run_dir),
        *("--data.train_images", "null", "--global_batch_size", 8, "--schedule.warmup_epochs", 0),
        *more,
    ]


def arguments(data: Path, run_dir: Path, *more) -> list:
    """Two epochs of ScaleKD on a few images, global batches of 8, micro batches of 2."""
    return [
        *("--recipe", "fashion-scalekd", "--data.root", data, "--run.dir", run_dir),
        *("--data.train_images", "null", "--teacher", "swin_tiny_patch4_window7_224", "--teacher_weights", "none"),
        *("--teacher_kwargs", json.dumps(TEACHER), "--global_batch_size", 8, "--micro_batch_size", 2),
        *("--schedule.epochs", 2, "--schedule.warmup_epochs", 0, "--run.log_every", 1, "--data.eval_batch_size", 4),
        *more,
    ]


def without_batchnorm(data: Path) -> dict:
    """A run's configuration for --config: two epochs of ScaleKD whose statistics are no rank's own.

    One node and two then take the same steps, which SGD keeps close: AdamW's first steps turn rounding into whole steps.
    """
    return {
        "student": "convnext_atto",
        "student_kwargs": {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32], "output_stride": 8},
        "teacher": "swin_tiny_patch4_window7_224",
        "teacher_kwargs": SWIN | {"embed_dim": 12, "depths": [1, 1], "num_heads": [1, 2], "num_classes": 2},
        "teacher_weights": "none",
        "global_batch_size": 8,
        "micro_batch_size": 4,
        "distill": {"norm": "layer"},
        "data": {"root": str(data), "image_size": 32, "threads": 1},
        "schedule": {"epochs": 2},
        "optim": {"name": "sgd", "lr": 0.05},
        "run": {"ds_config": "cpu_fp32"},
    }


def scalars(run_dir: Path) -> dict[str, dict[int, float]]:
    """name -> step -> value, over all event files of a run (a resumed run has several)."""
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
