"""A run that takes seconds on two cores: its teacher, its command line, and what it logged."""

from __future__ import annotations

import json
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# constructor arguments of swin_tiny_patch4_window7_224, for images of 32 pixels
SWIN = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4}
# with the classes of `image_fixtures.make_dataset(..., classes=3)`
TEACHER = SWIN | {"num_classes": 3}
# of every loss term that a run with such a teacher logs
TERMS = ("ce", "kd", "spatial_s3", "frequency_s3", "spatial_s4", "frequency_s4")


def arguments(data: Path, run_dir: Path, *more) -> list:
    """Two epochs of ScaleKD on a few images, global batches of 8, micro batches of 2."""
    return [
        *("--recipe", "fashion-scalekd", "--data.root", data, "--run.dir", run_dir),
        *("--data.train_images", "null", "--teacher", "swin_tiny_patch4_window7_224", "--teacher_weights", "none"),
        *("--teacher_kwargs", json.dumps(TEACHER), "--global_batch_size", 8, "--micro_batch_size", 2),
        *("--schedule.epochs", 2, "--schedule.warmup_epochs", 0, "--run.log_every", 1, "--data.eval_batch_size", 4),
        *more,
    ]


def scalars(run_dir: Path) -> dict[str, dict[int, float]]:
    """name -> step -> value, over all event files of a run (a resumed run has several)."""
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
