"""What the training loop holds, and what it counts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from scalekd_ds.checkpoint.saver import Saver
from scalekd_ds.cluster.heartbeat import Heartbeat
from scalekd_ds.cluster.preemption import Preemption
from scalekd_ds.config import RunConfig
from scalekd_ds.data import EvalLoader, TrainLoader
from scalekd_ds.data.mix import Mixer
from scalekd_ds.distiller import ScaleKD
from scalekd_ds.teacher import Teacher
from scalekd_ds.training.ema import StudentEma
from scalekd_ds.training.nonfinite import Nonfinite
from scalekd_ds.watching.monitor import Monitor


@dataclass
class Run:
    """Everything that the loop needs, and what it counts."""

    cfg: RunConfig
    device: torch.device
    engine: Any
    monitor: Monitor
    classes: list[str]
    train_loader: TrainLoader
    val_loader: EvalLoader
    mixer: Mixer | None
    total_steps: int
    steps_per_epoch: float
    saver: Saver
    heartbeat: Heartbeat
    preemption: Preemption
    nonfinite: Nonfinite
    step: int = 0
    cpu_seconds: float = 0.0
    grad_norm: torch.Tensor | None = None
    replica: nn.Module | None = None
    teacher_accuracy: dict[str, float] | None = None
    accuracy: dict[str, float] | None = None
    ema: StudentEma | None = None
    ema_accuracy: dict[str, float] | None = None
    # top1 and step of the best evaluation; wall seconds and joules of earlier starts
    best: dict[str, float] | None = None
    seconds_before: float = 0.0
    joules_before: float = 0.0
    # validation images for pictures, once they were read
    shown: torch.Tensor | None = None
    shows_pictures: bool = False

    @property
    def distiller(self) -> ScaleKD:
        return self.engine.module

    @property
    def teacher(self) -> Teacher | None:
        return self.distiller.teacher

    @property
    def ships(self) -> Literal["student", "ema"]:
        """Which weights student.safetensors gets, and whose accuracy is the run's."""
        return "ema" if self.ema is not None and self.cfg.ema.evaluate else "student"

    def validation(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """This rank's validation batches; each is a sign of life."""
        for batch in self.val_loader:
            self.heartbeat.progress()
            yield batch

    def accuracy_of(self, weights: Literal["student", "ema"]) -> dict[str, float] | None:
        return self.ema_accuracy if weights == "ema" else self.accuracy
