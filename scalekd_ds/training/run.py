"""The state of a run, which the functions of the training loop share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
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
from scalekd_ds.teacher_cache.reader import TeacherCache
from scalekd_ds.training.ema import StudentEma
from scalekd_ds.training.nonfinite import NonfiniteGuard
from scalekd_ds.watching.monitor import Monitor


@dataclass
class Run:
    """Everything that the training loop needs, and its counters.

    Attributes:
        cfg: Configuration of the run.
        device: Device of this rank.
        engine: DeepSpeed engine of student and projectors.
        monitor: Writer of scalars and pictures.
        classes: Names of the classes.
        train_loader: This rank's training batches.
        val_loader: This rank's validation batches.
        mixer: Mixup and cutmix within a batch, where the run uses them.
        total_steps: Optimizer steps of the run.
        images_before: Training images by which the run is ahead of `step * global_batch_size`, since earlier starts had
            another global batch; negative where theirs was smaller.
        steps_per_epoch: Optimizer steps in an epoch, which may be fractional.
        saver: Writer of checkpoints.
        heartbeat: Detector of ranks that died or hang.
        preemption: Receiver of signals that ask the run to stop.
        nonfinite: Guard against steps with NaN or inf.
        step: Optimizer steps done.
        record: What checkpoints say of the run's data, teacher and packages.
        cpu_seconds: Processor time of training on this rank, with that of earlier starts.
        grad_norm: Norm of the last step's gradients where DeepSpeed reports none.
        unsharded_student: Copy of the student for evaluation under ZeRO-3.
        teacher_accuracy: `top1` and `top5` of the teacher in percent, once it is evaluated.
        accuracy: The same of the student's own weights at the last evaluation.
        evaluated_step: The step of the last evaluation.
        left_out: Validation images that the last evaluation left out, over all ranks.
        shipped_step: The step of the weights in student.safetensors, where this start of the run has written them.
        ema: Moving average of the student, where the run keeps one.
        ema_accuracy: Accuracy of the moving average at the last evaluation.
        best: `top1` and `step` of the best evaluation so far.
        seconds_before: Wall-clock seconds of earlier starts of the run.
        joules_before: Energy of earlier starts in joules.
        gate: What `run.teacher_precision` changed of the teacher's answers, for the monitors.
        picture_images: Validation images of the pictures, once they are read.
        logs_pictures: Whether TensorBoard is on, which takes pictures.
        cache: The teacher cache that gives the targets, or None where the teacher does.
        is_elsewhere: Whether the run goes on from a checkpoint that is none of its own folder's.
    """

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
    nonfinite: NonfiniteGuard
    step: int = 0
    images_before: int = 0
    record: dict[str, Any] = field(default_factory=dict)
    cpu_seconds: float = 0.0
    grad_norm: torch.Tensor | None = None
    unsharded_student: nn.Module | None = None
    teacher_accuracy: dict[str, float] | None = None
    accuracy: dict[str, float] | None = None
    evaluated_step: int | None = None
    left_out: int = 0
    shipped_step: int | None = None
    ema: StudentEma | None = None
    ema_accuracy: dict[str, float] | None = None
    best: dict[str, float] | None = None
    seconds_before: float = 0.0
    joules_before: float = 0.0
    gate: dict[str, float] = field(default_factory=dict)
    picture_images: torch.Tensor | None = None
    logs_pictures: bool = False
    cache: TeacherCache | None = None
    is_elsewhere: bool = False

    @property
    def images(self) -> int:
        """Training images seen, with repetition."""
        return self.images_before + self.step * self.cfg.global_batch_size

    @property
    def distiller(self) -> ScaleKD:
        """Student, projectors and losses: the module of the engine."""
        return self.engine.module

    @property
    def teacher(self) -> Teacher | None:
        """The teacher, or None for a run without one."""
        return self.distiller.teacher

    @property
    def shipped_weights(self) -> Literal["student", "ema"]:
        """The weights that student.safetensors gets and whose accuracy is that of the run."""
        return "ema" if self.ema is not None and self.cfg.ema.evaluate else "student"

    def validation_batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """This rank's validation batches; each one counts as progress for the heartbeat.

        Raises:
            Preempted: A signal asked the run to stop.
        """
        for batch in self.val_loader:
            self.heartbeat.progress()
            self.preemption.raise_if_stopped()
            yield batch

    def accuracy_of(self, weights: Literal["student", "ema"]) -> dict[str, float] | None:
        """Accuracy of the student's own weights or of their average at the last evaluation, None before the first."""
        return self.ema_accuracy if weights == "ema" else self.accuracy

    def measured(self, weights: Literal["student", "ema"]) -> dict[str, float]:
        """`accuracy_of` after an evaluation.

        Raises:
            RuntimeError: There was none yet.
        """
        accuracy = self.accuracy_of(weights)
        if accuracy is None:
            raise RuntimeError(f"the weights {weights!r} are not evaluated yet")
        return accuracy
